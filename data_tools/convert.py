"""Raw datasets → a shard store: plan, convert every case, publish. The same command again goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from data_tools.collection import ResolvedCollection
from data_tools.findings import Finding, sort_findings
from data_tools.forecast import forecast, is_stored, peak_bytes, require_space
from data_tools.integrity import Expected, find_duplicates
from data_tools.jobs import Job, Outcome, Status, Target, run_job
from data_tools.journal import Journal, Key, StorePlan
from data_tools.one_writer import one_writer
from data_tools.progress import ProgressReport
from hermes_dist.errors import StoreError, UsageError
from hermes_dist.shards.collection import COLLECTION_FILE, Collection, recover
from hermes_dist.shards.remote import open_storage
from hermes_dist.shards.store import create_store, open_store
from hermes_dist.shards.writer import StoreWriter
from hermes_dist.tasks import TaskTable


@dataclass(frozen=True)
class Settings:
    """How to run a conversion. `part` = (i, n): convert the i-th of n parts and leave publishing to `merge`."""

    format: str = "zarr"
    workers: int = 0
    ray_address: str = "local"
    part: tuple[int, int] | None = None
    prune: bool = False
    check_space: bool = True


@dataclass
class ConversionReport:
    """What a conversion did. `collection` is None where nothing was published."""

    url: str
    status_of: dict[Key, Status] = field(default_factory=dict[Key, Status])
    findings: list[Finding] = field(default_factory=list[Finding])
    removed: list[Key] = field(default_factory=list[Key])
    collection: Collection | None = None
    input_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """Cases by how they ended."""
        return Counter(self.status_of.values())

    @property
    def rejected(self) -> list[Finding]:
        """The quarantine list."""
        return [f for f in self.findings if f.severity == "reject"]


def plan_jobs(collection: ResolvedCollection) -> list[Job]:
    """One job a case, in the order of the collection."""
    return [
        Job(d.name, d.layout, case, d.modality, d.split_of.get(case.case_id, "train"), Expected.of(d), collection.preprocessing)
        for d in collection.datasets
        for case in d.cases
    ]


def plan_digest(jobs: Sequence[Job], format: str, tasks: TaskTable) -> str:
    """Hash of a conversion: format, task table, and the parameters of every case, but no path, since hosts mount differently."""
    digest = hashlib.blake2b(json.dumps([format, tasks.to_json()], sort_keys=True).encode(), digest_size=16)
    for job in sorted(jobs, key=lambda j: j.key):
        digest.update(json.dumps([*job.key, job.parameters]).encode())
    return digest.hexdigest()


def in_part(key: Key, part: tuple[int, int]) -> bool:
    """Whether a case belongs to part i of n (1-based): by a hash, so that all hosts agree whatever they list."""
    digest = hashlib.blake2b("/".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % part[1] == part[0] - 1


def existing_splits(url: str) -> dict[Key, str]:
    """(dataset, case id) → split of a finished store at this URL; empty where there is none.

    A publication that was killed half-way is finished first.

    Raises:
        StoreError, CorruptShardError, TransientStorageError: there is a store, and it cannot be read. Taking it for none would
            draw the splits anew.
    """
    storage = open_storage(url)
    recover(storage)
    if storage.size(COLLECTION_FILE) is None:
        return {}
    manifest = open_store(url).manifest
    return {
        (manifest.dataset_names[manifest.dataset_index[i]], manifest.case_id(i)): split
        for split in manifest.splits
        for i in manifest.rows(None, split)
    }


def convert(collection: ResolvedCollection, url: str, settings: Settings, say: Callable[[str], None] = print) -> ConversionReport:
    """Convert a collection into the store at `url`.

    Raises:
        UsageError: nothing to convert, the store holds datasets that this collection does not name, or another conversion
            writes it.
        StoreError, TransientStorageError: the store cannot be written.
    """
    with one_writer(url, part=settings.part is not None):
        return _convert(collection, url, settings, say)


def _convert(collection: ResolvedCollection, url: str, settings: Settings, say: Callable[[str], None]) -> ConversionReport:
    started = time.monotonic()
    tasks = collection.task_table()
    published = existing_splits(url)
    lost = sorted({dataset for dataset, _ in published} - {d.name for d in collection.datasets})
    if lost and not settings.prune:
        raise UsageError(
            f"{url} holds dataset {lost[0]!r}, which this conversion does not name; add it, or give --prune to drop it"
        )
    jobs = plan_jobs(collection)
    own_findings = [f for d in collection.datasets for f in d.findings]
    splits, digest = {j.key: j.split for j in jobs}, plan_digest(jobs, settings.format, tasks)
    plan = StorePlan(settings.format, tasks, collection.preprocessing, splits, own_findings, digest)
    writer = create_store(url, settings.format, tasks=tasks, preprocessing=collection.preprocessing)
    journal = Journal(url)
    if settings.part:
        journal.join_plan(plan)
        jobs = [j for j in jobs if in_part(j.key, settings.part)]
    journal.drop_leftovers()
    memory = _Memory(journal.history(), journal.staged())
    if jobs and settings.check_space:
        ahead = [j for j in jobs if not is_stored(j, memory.of(j.key))]
        say(require_space(forecast(ahead, len(jobs) - len(ahead)), url))
    journal.write_plan(plan)
    report = ConversionReport(url)
    known = memory.history | memory.staged
    jobs = [replace(j, known=memory.hashes(j.key)) for j in jobs]
    for outcome in _run(jobs, Target(writer, journal, digest), settings, report):
        known[outcome.key], news = memory.settle(replace(outcome, plan=digest), in_part=settings.part is not None)
        if news:
            journal.write(known[outcome.key])
    if settings.part:
        journal.confirm_plan(plan)
        report.findings = sort_findings([f for j in jobs for f in known[j.key].findings])
    else:
        _publish(plan, journal, writer, known, report)
        report.removed = sorted(published.keys() - plan.split_of.keys())
    report.seconds = time.monotonic() - started
    return report


def merge(url: str) -> ConversionReport:
    """Publish what the parts of a conversion have written.

    Raises:
        StoreError: no unfinished conversion there, or parts that have not run.
        UsageError: a conversion is writing it.
    """
    with one_writer(url):
        return _merge(url)


def _merge(url: str) -> ConversionReport:
    started = time.monotonic()
    journal = Journal(url)
    plan = journal.read_plan()
    known = {key: o for key, o in journal.staged().items() if o.plan == plan.digest and key in plan.split_of}
    published = existing_splits(url)
    writer = create_store(url, plan.format, tasks=plan.tasks, preprocessing=plan.preprocessing)
    stored = writer.content_hashes()
    done = {key for key, o in known.items() if o.status == "rejected" or stored.get(key) == o.content_hash}
    missing = sorted(plan.split_of.keys() - done)
    if missing:  # an outcome of another plan, or none, or one whose case is still being written
        names = ", ".join("/".join(key) for key in missing[:5])
        raise StoreError(
            f"{url}: {len(missing)} cases were not converted yet with the parameters in .staging/plan.json, e.g. {names}; "
            "run the missing parts to their end with the same arguments (or one convert without --part), then merge again"
        )
    report = ConversionReport(url)
    report.status_of = {key: known[key].status for key in plan.split_of}
    _publish(plan, journal, writer, known, report)
    report.removed = sorted(published.keys() - plan.split_of.keys())
    report.seconds = time.monotonic() - started
    return report


def check(collection: ResolvedCollection, *, workers: int = 0, ray_address: str = "local") -> ConversionReport:
    """The integrity report of raw data; nothing is written."""
    started = time.monotonic()
    jobs = plan_jobs(collection)
    report = ConversionReport("")
    outcomes = {o.key: o for o in _run(jobs, None, Settings(workers=workers, ray_address=ray_address), report)}
    findings = [f for d in collection.datasets for f in d.findings] + [f for o in outcomes.values() for f in o.findings]
    report.findings = sort_findings([*findings, *_duplicates(outcomes, {j.key: j.split for j in jobs})])
    report.seconds = time.monotonic() - started
    return report


def _run(jobs: Sequence[Job], target: Target | None, settings: Settings, report: ConversionReport) -> list[Outcome]:
    """All outcomes, counted and shown as they come."""
    sizes = {j.key: sum(f.stat().st_size for f in j.case.files if f.is_file()) for j in jobs}
    outcomes: list[Outcome] = []
    what = "convert" if target else "check"
    with ProgressReport(what, len(jobs), sum(sizes.values())) as progress:
        for outcome in _outcomes(jobs, target, settings):
            outcomes.append(outcome)
            report.status_of[outcome.key] = outcome.status
            report.input_bytes += outcome.input_bytes
            report.stored_bytes += outcome.stored_bytes
            for finding in outcome.findings:
                if finding.severity == "reject":
                    print(f"rejected {finding.dataset}/{finding.case_id}: {finding.message}", file=sys.stderr, flush=True)
            progress.advance(sizes[outcome.key])
    return outcomes


def _outcomes(jobs: Sequence[Job], target: Target | None, settings: Settings) -> Iterable[Outcome]:
    if not settings.workers:
        return (run_job(job, target) for job in jobs)
    from data_tools.pool import run_jobs  # Ray takes half a second to load

    need = peak_bytes if settings.workers > 1 else lambda _: 0
    return run_jobs(jobs, target, workers=settings.workers, ray_address=settings.ray_address, peak_bytes=need)


@dataclass(frozen=True)
class _Memory:
    """What earlier runs said of the cases: of the finished conversion, and of the unfinished one."""

    history: dict[Key, Outcome]
    staged: dict[Key, Outcome]

    def of(self, key: Key) -> list[Outcome]:
        """Outcomes of a case, the newest first."""
        return [memory[key] for memory in (self.staged, self.history) if key in memory]

    def hashes(self, key: Key) -> frozenset[str]:
        """Content hashes that outcomes are known of."""
        return frozenset(o.content_hash for o in self.of(key) if o.content_hash)

    def settle(self, outcome: Outcome, *, in_part: bool) -> tuple[Outcome, bool]:
        """The outcome to keep, and whether it must be written down.

        An unchanged case keeps what was found when it was converted. It is written where a newer outcome (a file that could not
        be read for a moment) says otherwise, and in parts, since `merge` asks for this plan's word on every case.
        """
        if outcome.status == "rejected":
            return outcome, True
        same = next((o for o in self.of(outcome.key) if o.content_hash == outcome.content_hash), None)
        if outcome.status != "unchanged" or outcome.image_hash is not None or same is None:
            return outcome, False  # its worker has written it
        before = self.staged.get(outcome.key)
        if (not in_part and before in (None, same)) or (same is before and same.plan == outcome.plan):
            return same, False
        return replace(same, status="unchanged", plan=outcome.plan), True


def _duplicates(outcomes: dict[Key, Outcome], split_of: dict[Key, str]) -> list[Finding]:
    images = {key: o.image_hash for key, o in outcomes.items() if o.image_hash and o.status != "rejected" and key in split_of}
    return find_duplicates(images, split_of)


def _publish(plan: StorePlan, journal: Journal, writer: StoreWriter, known: dict[Key, Outcome], report: ConversionReport) -> None:
    """Leave rejected and leaking cases out, publish the rest and the report."""
    outcomes = {key: known[key] for key in plan.split_of if key in known}
    duplicates = _duplicates(outcomes, plan.split_of)
    leaking = {(f.dataset, f.case_id) for f in duplicates if f.severity == "reject"}
    keep = {key for key, o in outcomes.items() if o.status != "rejected" and key not in leaking}
    report.status_of.update(dict.fromkeys(leaking, "rejected"))
    report.findings = sort_findings([*plan.findings, *(f for o in outcomes.values() for f in o.findings), *duplicates])
    if not keep:
        journal.write_findings(report.findings)
        raise StoreError(f"{report.url}: every case was rejected, so no store was published; integrity.json there says why")
    report.collection = writer.finish(keep)
    absent = _absent_classes(report.url, plan)
    report.findings = sort_findings([*report.findings, *absent])
    journal.publish([replace(o, seconds=0.0, plan="") for o in outcomes.values()], report.findings)


def _absent_classes(url: str, plan: StorePlan) -> list[Finding]:
    """Classes that no case of their dataset shows: a wrong id or name, more often than not."""
    manifest = open_store(url).manifest
    findings: list[Finding] = []
    for dataset in plan.tasks.datasets:
        seen = [0] * len(dataset.classes)
        for i in manifest.rows(dataset.name):
            seen = [a + b for a, b in zip(seen, manifest.row(int(i)).class_voxels, strict=True)]
            if all(seen):
                break
        for entry, voxels in zip(dataset.classes, seen, strict=True):
            if not voxels:
                message = f"class {entry.name!r} (values {list(entry.values)[:8]}) occurs in no case"
                findings.append(Finding("absent class", "warn", message, "check its value", dataset=dataset.name))
    return findings
