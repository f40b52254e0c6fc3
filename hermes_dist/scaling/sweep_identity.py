"""Whether a member's directory holds the run that the sweep describes now: its name tells the grid's values only.

Base file, overrides, command line and the stores' content may have changed since a run was made. Then its results answer another
question, so the sweep refuses to go on with them, and rows of the results table are made from the configuration that the run
really had.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hermes_dist.config import Config, differences, load_config
from hermes_dist.errors import ConfigError, HermesError
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.shards.collection import DIGESTS_FILE, joined_digest, read_collection, recorded_digests

NO_MATTER = (
    "monitor.",
    "run.output_dir",
    "run.resume",
    "checkpoint.keep",
    "data.allow_changed_collection",
    "stream.cache_",
    "stream.object_store_mib",
    "stream.ray_address",
    "stream.wait_limit_s",
    "train.step_limit_s",
)
"""Beginnings of keys that change neither what a run learns nor how fast a step is."""


def stored_config(member: Member) -> Config | None:
    """What the member's run used, from its config.json; None before its first start. Raises ConfigError if it is unreadable."""
    path = member.run_dir / "config.json"
    return load_config(path) if path.is_file() else None


def config_of(member: Member) -> Config:
    """The configuration that a result row is about: that of the run, or of the sweep where there is no run yet."""
    return stored_config(member) or member.config()


def check_unchanged(members: Iterable[Member]) -> None:
    """Refuse runs of an earlier form of the sweep, or of data that has changed since.

    Stores that cannot be read now are not compared, and neither are runs that recorded no digest; a line on stderr says so.

    Raises:
        ConfigError: a run used other values than the sweep sets now (names the first key, both values and what to do), or its
            stores held other cases.
    """
    present: dict[tuple[str, ...], str | None] = {}
    unknown: list[Path] = []
    for member in members:
        used = stored_config(member)
        if used is None:
            continue
        found = differences(used.model_dump(mode="json"), member.config().model_dump(mode="json"))
        different = [(key, old, new) for key, old, new in found if not key.startswith(NO_MATTER)]
        if different:
            key, old, new = different[0]
            more = f" ({len(different) - 1} more keys differ)" if len(different) > 1 else ""
            raise ConfigError(
                f"{member.run_dir} was run with {key} = {old!r} and the sweep now says {new!r}{more}: its results belong to "
                f"another sweep. Give this sweep another name, set {key} back, or delete {member.run_dir}"
            )
        stores, before = tuple(used.data.stores), recorded_digests(member.run_dir)
        if before and stores not in present:
            present[stores] = _present_digest(stores)
        now = present.get(stores)
        if not before:
            unknown.append(member.run_dir)
        elif now is not None and before != [now]:
            raise ConfigError(
                f"{member.run_dir} has read {', '.join(stores)} with the content {', then '.join(before)}, which is now {now}: "
                "its results are about other data. Give this sweep another name, name the stores with the old content, or delete "
                f"{member.run_dir}"
            )
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        _say(f"{unknown[0]}{more}: no {DIGESTS_FILE}, so whether the data has changed since is not known")


def _present_digest(stores: Sequence[str]) -> str | None:
    """Of the stores' content; None where one cannot be read, which a member that has to train finds by itself."""
    try:
        return joined_digest([read_collection(url) for url in stores])
    except HermesError as error:
        _say(f"whether the data of finished runs has changed is not known: {error}")
        return None


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def lacking(member: Member, sweep: SweepConfig) -> list[Path]:
    """Result files that the sweep wants of the member and that are not there, or are over another number of patches."""
    return [path for path in member.results(sweep) if not _answers(path, member, sweep)]


def _answers(path: Path, member: Member, sweep: SweepConfig) -> bool:
    if not path.is_file():
        return False
    held_out = sweep.held_out
    if held_out is None or path != member.held_out(held_out):
        return True
    found = json.loads(path.read_text())
    # Files without `requested` state what was measured, whole batches: it is the request where that is a multiple.
    return found.get("requested", found.get("samples")) == held_out.samples
