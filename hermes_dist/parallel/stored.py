"""Complete checkpoints on the disk: found, opened, checked, and deleted when newer ones replace them."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hermes_dist.config import CheckpointConfig
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.fragments import Fragment, FragmentReader, measure_file, write_bytes

FORMAT = 1
AMENDED = "amended.json"
"""In a checkpoint: the caller's state as it was learned later, at the same step. It replaces the one in checkpoint.json."""
ABANDONED = "abandoned-"
_LOOK_S = 0.1
"""Between two looks for a directory that another host wrote."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint directory that was renamed into place, with its parsed index."""

    path: Path
    index: dict[str, Any]
    index_crc32: int
    """Of checkpoint.json, which holds the checksums of all other files: it tells two checkpoints of one name apart."""

    @property
    def step(self) -> int:
        """Global step after which it was written."""
        return int(self.index["step"])

    def reader(self) -> FragmentReader:
        """Reader of its pieces."""
        return FragmentReader(self.path, {f: [Fragment(*row) for row in e["fragments"]] for f, e in self.index["files"].items()})

    def damaged_files(self, part: int = 0, parts: int = 1) -> list[str]:
        """Names of files, among every `parts`-th, whose size or checksum does not match."""
        bad: list[str] = []
        for name, entry in sorted(self.index["files"].items())[part::parts]:
            try:
                sound = measure_file(self.path / name) == {"bytes": entry["bytes"], "crc32": entry["crc32"]}
            except OSError:
                sound = False
            if not sound:
                bad.append(name)
        return bad


class DamagedIndexError(CheckpointError):
    """A directory whose checkpoint.json is missing, cut off, or something else."""


def list_checkpoints(run_dir: Path) -> list[Stored]:
    """Complete checkpoints of a run, newest first. One whose index is damaged is reported on stderr and left out.

    Raises:
        CheckpointError: the storage failed, or one was written by another version: it may be sound, and must not be passed over.
    """
    found: list[Stored] = []
    for path in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        try:
            found.append(open_checkpoint(path))
        except DamagedIndexError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    return found


def open_checkpoint(path: Path) -> Stored:
    """Read a checkpoint's index.

    Raises:
        DamagedIndexError: it is missing, or no index.
        CheckpointError: it could not be read, or has another format version.
    """
    try:
        text = (path / "checkpoint.json").read_bytes()
        index = json.loads(text)
        version = index["format"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(
            f"{path} is no readable checkpoint ({error}); expected a directory with checkpoint.json"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: checkpoint.json could not be read ({error}); it may be undamaged. Mend the storage or the "
            "permissions and start again, or name another checkpoint with run.resume=PATH"
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version}; this version reads format {FORMAT}. Use the version that wrote it (see "
            "environment.json of the run), or another run.name"
        )
    return Stored(path, index, zlib.crc32(text))


def await_checkpoint(path: Path, index_crc32: int, limit_s: float) -> Stored:
    """Open the checkpoint that rank 0 chose; a host whose view of the file system is behind looks again until it sees it.

    Raises:
        CheckpointError: it did not see that very checkpoint within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            stored = open_checkpoint(path)
            if stored.index_crc32 == index_crc32:
                return stored
            why = f"its checkpoint.json has CRC-32 {stored.index_crc32:08x} here, expected {index_crc32:08x} as on rank 0"
        except CheckpointError as error:
            why = str(error)
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path}: rank 0 resumes from it, and this host did not see it within {limit_s:.0f} s: {why}. "
                "All hosts must mount the same file system at the same path; check the mount there and start again"
            )
        time.sleep(_LOOK_S)


def set_aside(path: Path) -> Path:
    """Hide a checkpoint in one go, under a name that the next `prune` deletes. Returns where it is."""
    return path.rename(path.parent / f".tmp-old-{secrets.token_hex(5)}")


def abandon(path: Path) -> None:
    """Put a checkpoint out of the way under a name that is never resumed from, and never deleted by the run."""
    target, number = path.parent / f"{ABANDONED}{path.name}", 2
    while target.exists():
        target, number = path.parent / f"{ABANDONED}{path.name}-{number}", number + 1
    path.rename(target)


def prune(root: Path, config: CheckpointConfig, committed: str) -> None:
    """Delete leftovers of killed writers, and complete checkpoints beyond `keep` and `keep_every_hours`; never `committed`.

    What cannot be deleted now (on a network file system, a file that somebody reads) is no error: the next call tries again.
    """
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    complete: list[Stored] = []
    for path in sorted(root.glob("step_*")):
        try:
            complete.append(open_checkpoint(path))
        except CheckpointError:
            continue  # reported, and left for a person to look at, wherever checkpoints are listed
    best = best_name(root.parent)
    kept_time = float("-inf")
    for stored in complete[: -config.keep]:
        hourly = config.keep_every_hours is not None and stored.index["time"] - kept_time >= config.keep_every_hours * 3600
        if hourly:
            kept_time = stored.index["time"]
        elif stored.path.name not in (best, committed):
            shutil.rmtree(set_aside(stored.path), ignore_errors=True)


def read_state(stored: Stored) -> dict[str, Any]:
    """The caller's state, as amended where it was."""
    try:
        return json.loads((stored.path / AMENDED).read_bytes())
    except (OSError, ValueError):  # there is none, or it is damaged: it only adds to the other
        return stored.index["state"]


def read_extra(stored: Stored, file: str, kind: str) -> dict[str, Tensor]:
    """Whole tensors `kind/name` of one file, by name."""
    return {k.partition("/")[2]: v for k, v in load_file(stored.path / file).items() if k.startswith(f"{kind}/")}


def best_name(run_dir: Path) -> str | None:
    """Name of the checkpoint that `mark_best` marked, if any."""
    mark = run_dir / "checkpoints" / "best"
    return mark.read_text().strip() if mark.is_file() else None


def mark_best(run_dir: Path, step: int) -> None:
    """Spare the checkpoint of `step` from pruning (on rank 0 only)."""
    write_bytes(run_dir / "checkpoints" / "best", f"step_{step:08d}\n".encode())
