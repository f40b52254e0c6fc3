"""The work on one case, in whichever process: read → inspect → prepare → store. Every end is an `Outcome`, never an exception."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from data_tools.findings import Finding, RejectedError
from data_tools.integrity import Expected, image_hash, inspect_case
from data_tools.sources import SOURCES
from data_tools.sources.raw import CaseRef, RawCase
from hermes_dist.errors import (
    CorruptShardError,
    DataError,
    GeometryError,
    HermesError,
    SourceError,
    StorageAccessError,
    StoreError,
    TransientStorageError,
)
from hermes_dist.shards.case import MAX_VOXELS, CaseRecord
from hermes_dist.volume.geometry import Placement
from hermes_dist.volume.intensity import is_ct
from hermes_dist.volume.preprocess import Preprocessing, preprocess_image, preprocess_label, require_size

PIPELINE_VERSION = 3
"""Raised whenever the same inputs and parameters give other voxels: stored cases are then converted again."""
LOST_LABEL_WARNING = 0.001

Status = Literal["converted", "unchanged", "rejected", "checked"]


class CaseWriter(Protocol):
    """What conversion needs of a store's writer."""

    def existing(self, dataset: str, case_id: str) -> str | None:
        """Content hash of a stored case."""
        ...

    def write_case(self, record: CaseRecord, image_zyx: np.ndarray, label_zyx: np.ndarray) -> Any:
        """Store and publish one case; the result has `.row.file_bytes`."""
        ...


class OutcomeLog(Protocol):
    """Where outcomes are kept beside the store."""

    def write(self, outcome: Outcome) -> None:
        """Keep an outcome, complete or not at all."""
        ...


@dataclass(frozen=True)
class Target:
    """Where cases go; picklable."""

    writer: CaseWriter
    log: OutcomeLog
    plan: str = ""
    """Digest of the plan that outcomes belong to."""


@dataclass(frozen=True)
class Job:
    """One case to convert; picklable.

    `known` holds the content hashes whose outcomes are at hand: a stored case of another hash is looked at again, since its
    findings and its image's hash would be lost.
    """

    dataset: str
    layout: str
    case: CaseRef
    modality: str
    split: str
    expected: Expected
    params: Preprocessing
    known: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[str, str]:
        """(dataset, case id)."""
        return self.dataset, self.case.case_id

    @property
    def parameters(self) -> str:
        """Hash of everything but the input that shapes what is stored."""
        return self.content_hash("")

    def content_hash(self, inputs: str) -> str:
        """Hash of the input bytes and of everything that shapes what is stored."""
        parameters = {
            "version": PIPELINE_VERSION,
            "params": self.params.model_dump(mode="json"),
            "modality": self.modality,
            "split": self.split,
            "classes": self.expected.classes,
            "declared": sorted(self.expected.declared_values),  # decides whether the label is accepted
            "ignore": self.expected.ignore_value,
            "trust": self.expected.trust_image_grid,
        }
        text = json.dumps([inputs, parameters], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    `image_hash` is None where the image was not read, `plan` is the digest of the conversion's plan, `parameters` is that of the
    job.
    """

    dataset: str
    case_id: str
    status: Status
    findings: list[Finding] = field(default_factory=list[Finding])
    image_hash: str | None = None
    content_hash: str | None = None
    input_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    plan: str = ""
    parameters: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """(dataset, case id)."""
        return self.dataset, self.case_id

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {**asdict(self), "findings": [f.to_json() for f in self.findings]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Outcome:
        """Inverse of `to_json`."""
        fields: dict[str, Any] = {**data, "findings": [Finding.from_json(f) for f in data["findings"]]}
        return Outcome(**fields)


def run_job(job: Job, target: Target | None) -> Outcome:
    """Convert one case, or only check it where there is no target.

    Findings of damaged data become a `rejected` outcome.

    Raises:
        StoreError, CorruptShardError, TransientStorageError, StorageAccessError: the store failed. HermesError: not enough
            memory. Neither says anything of this case, and a rejection would delete what is published of it.
    """
    started = time.perf_counter()
    input_bytes = sum(f.stat().st_size for f in job.case.files if f.is_file())
    dataset, case_id = job.key
    file = str(job.case.image_path)
    stored = target.writer.existing(dataset, case_id) if target else None
    try:
        if stored is not None and stored in job.known and stored == job.content_hash(SOURCES[job.layout].fingerprint(job.case)):
            seconds = time.perf_counter() - started
            return Outcome(dataset, case_id, "unchanged", content_hash=stored, input_bytes=input_bytes, seconds=seconds)
        raw = SOURCES[job.layout].load(job.case)
        findings = [*raw.findings, *inspect_case(raw, job.expected), *_hounsfield(job, raw)]
        digest, content = image_hash(raw), job.content_hash(raw.digest)
        prepared = _prepare(job, raw, findings) if target else None
    except RejectedError as error:
        return _rejected(job, error.finding.at(dataset, case_id, file), input_bytes, started)
    except (GeometryError, SourceError) as error:  # their messages say what to do
        check = "geometry" if isinstance(error, GeometryError) else "unreadable"
        finding = Finding(check, "reject", str(error), "see the message")
        return _rejected(job, finding.at(dataset, case_id, file), input_bytes, started)
    except (StoreError, CorruptShardError, TransientStorageError, StorageAccessError):
        raise
    except MemoryError as error:
        raise HermesError(
            f"{file}: not enough memory to convert {dataset}/{case_id} ({error or 'allocation failed'}); convert with fewer "
            "workers or on a larger machine; the same command goes on where it was"
        ) from error
    except Exception as error:  # a file that trips code we did not foresee must cost one case, not the whole conversion
        message = f"unexpected {type(error).__name__}: {error}"
        finding = Finding("unexpected", "reject", message, "please report this file's header", file, dataset, case_id)
        return _rejected(job, finding, input_bytes, started)
    attributed = [f.at(dataset, case_id, file) for f in findings]
    outcome = Outcome(dataset, case_id, "checked", attributed, digest, content, input_bytes, parameters=job.parameters)
    if target and prepared:
        outcome = replace(outcome, status="unchanged" if content == stored else "converted", plan=target.plan)
        target.log.write(outcome)  # before the case is published: whoever finds the case also finds what was said of it
    if target and prepared and outcome.status == "converted":
        try:
            outcome = replace(outcome, stored_bytes=_store(job, target.writer, prepared, content))
        except (StoreError, CorruptShardError):
            raise
        except DataError as error:  # voxels that cannot be stored: this case, not the conversion
            finding = Finding("not storable", "reject", str(error), "see the message; leave the case out if nothing helps")
            return _rejected(job, finding.at(dataset, case_id, file), input_bytes, started)
    return replace(outcome, seconds=time.perf_counter() - started)


def _hounsfield(job: Job, raw: RawCase) -> list[Finding]:
    """CT is clipped in Hounsfield units: values that lack the rescale intercept would lose their contrast without a word."""
    if not is_ct(job.modality) or (low := float(raw.image_zyx.min())) < 0:
        return []
    message = f"CT values from {low:g} to {float(raw.image_zyx.max()):g}, none below 0; Hounsfield units have air at -1000"
    hint = "add the rescale intercept (-1024, mostly), or state the modality if this is no CT; a scan without any air may stay"
    return [Finding("intensity", "warn", message, hint)]


def _rejected(job: Job, finding: Finding, input_bytes: int, started: float) -> Outcome:
    return Outcome(*job.key, "rejected", [finding], input_bytes=input_bytes, seconds=time.perf_counter() - started)


@dataclass
class _PreparedCase:
    image_zyx: np.ndarray
    label_zyx: np.ndarray
    placement: Placement
    stats: dict[str, float]

    def take_image(self) -> np.ndarray:
        """The image, which is then held by the caller alone: the writer may let go of it before it compresses."""
        image, self.image_zyx = self.image_zyx, self.image_zyx[:0].copy()
        return image


def _prepare(job: Job, raw: RawCase, findings: list[Finding]) -> _PreparedCase:
    try:
        require_size(raw.image_zyx, raw.grid, job.modality, job.params, below_vox=MAX_VOXELS)
    except GeometryError as error:
        raise RejectedError("size", str(error), "or set a coarser spacing in preprocessing") from None
    stats = {"raw_min": float(raw.image_zyx.min()), "raw_max": float(raw.image_zyx.max())}
    image, placement, made = preprocess_image(raw.image_zyx, raw.grid, job.modality, job.params)
    if not np.isfinite(made["std"]) or made["std"] == 0:
        raise _no_contrast(job, stats | made)
    raw.image_zyx = raw.image_zyx[:0].copy()  # the scan itself is not needed any more; at most one full copy lives at a time
    label = preprocess_label(raw.label_zyx, raw.grid, placement, job.params)
    total = int(np.count_nonzero(raw.label_zyx))
    outside = total - int(np.count_nonzero(placement.orientation.apply(raw.label_zyx)[placement.crop_slices]))
    if outside > LOST_LABEL_WARNING * total:
        message = f"{outside:,} of {total:,} labelled voxels lie in air outside the body and are cropped away"
        findings.append(Finding("crop", "warn", message, 'set "crop_body": false in preprocessing'))
    raw.label_zyx = label[:0].copy()
    return _PreparedCase(image, label, placement, stats | made)


def _no_contrast(job: Job, stats: dict[str, float]) -> RejectedError:
    """Why a volume has no z-score; stored, it would be zeros that nobody notices."""
    seen = f"values from {stats['raw_min']:g} to {stats['raw_max']:g}"
    if not np.isfinite(stats["std"]):
        message = f"{seen} are too far apart for single precision"
        return RejectedError("intensity", message, "scale the image, or remove the voxels that stand out")
    clip = f"[{stats['clip_low']:g}, {stats['clip_high']:g}]"
    if is_ct(job.modality):
        message = f"constant after clipping to {clip} HU ({seen})"
        hint = 'state the modality if this is no CT, repair the rescale slope and intercept, or set "ct_clip_hu" in preprocessing'
        return RejectedError("constant", message, hint)
    low, high = job.params.percentiles
    message = f"constant after clipping to {clip}, its own percentiles {low:g} and {high:g} ({seen})"
    hint = 'nearly every voxel is background: crop the scan, set wider "percentiles" in preprocessing, or leave the case out'
    return RejectedError("constant", message, hint)


def _store(job: Job, writer: CaseWriter, prepared: _PreparedCase, content_hash: str) -> int:
    record = CaseRecord(
        dataset=job.dataset,
        case_id=job.case.case_id,
        modality=job.modality,
        split=job.split,
        spacing_mm_zyx=prepared.placement.stored.spacing_mm_zyx,
        placement=json.dumps(prepared.placement.to_json()),
        content_hash=content_hash,
        stats=prepared.stats,
    )
    try:
        entry = writer.write_case(record, prepared.take_image(), prepared.label_zyx)
    except (StoreError, CorruptShardError) as error:
        raise type(error)(f"{job.dataset}/{job.case.case_id}: {error}") from error
    return sum(entry.row.file_bytes)
