"""The reader: one row of the plan and the stores → one sample. What a worker does, wherever it runs.

Everything follows from the row: the crop, the augmentation, and what happens when bytes are bad. Storage errors that may pass
are tried again with growing pauses. A case whose crop cannot be read is replaced by the case of the next draw of the same
dataset. Whether a sample is replaced depends on its own bytes only, never on what was read before, so that all workers and
world sizes agree without talking to each other.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hermes_dist.config import AugmentConfig, DataConfig, FaultsConfig, Vox3
from hermes_dist.errors import DataError, HermesError, QuarantineLimitError, StreamError, TransientStorageError
from hermes_dist.shards.retry import retried
from hermes_dist.stream.chaos import Chaos
from hermes_dist.stream.crop import choose_start
from hermes_dist.stream.keyed import uniform
from hermes_dist.stream.plan import Plan, PlanRows
from hermes_dist.volume import augment

_JITTER = 7
_NOTHING = np.zeros(0, np.int32)
IO = ("bytes_read", "bytes_fetched", "cache_hits", "cache_misses")
"""Counters of a store that are followed to the sample."""
OPEN_RETRIES, OPEN_PAUSE_S = 7, 0.5
"""Of a worker that opens the stores: a minute in all, because many may do so at once."""


class Store(Protocol):
    """What the stream needs of a shard store (`hermes_dist.shards.store.ShardStore`)."""

    @property
    def manifest(self) -> Any:
        """Rows, foreground coordinates, names."""
        ...

    @property
    def counters(self) -> Any:
        """`decode_s`: seconds spent on decoding so far; `bytes_read`, `bytes_fetched`, `cache_hits`, `cache_misses`."""
        ...

    @property
    def cache(self) -> Any:
        """The disk cache of a remote store (`counted_bytes()`), or None."""
        ...

    def read_crop(
        self, row: Any, start_vox_zyx: Vox3, size_vox_zyx: Vox3, *, reach: augment.Reach | None = None, stored: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(image float32 or as it is stored, label) of a box; air and 0 outside of the volume and out of reach."""
        ...


@dataclass
class Sample:
    """One sample, ready for a batch.

    `image` float32 and `label` integer are (Z, Y, X). With augmentation on the device they are the source box that `numbers`
    still has to be applied to, and `patch_start` is the patch's first voxel in that box.
    """

    position: int
    dataset: int
    case: int
    identity: int
    image: npt.NDArray[np.float32]
    label: npt.NDArray[Any]
    numbers: augment.Draw | None = None
    patch_start: Vox3 = (0, 0, 0)
    parts_s: dict[str, float] = field(default_factory=dict[str, float])
    io: dict[str, int] = field(default_factory=dict[str, int])
    """What its reading took of the store's counters: IO."""
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class _Box(NamedTuple):
    """What to read of a case; see `Store.read_crop`."""

    start: Vox3
    sides: Vox3
    reach: augment.Reach | None = None
    stored: bool = False


class Reader:
    """Reads the samples of a plan. Can be pickled: stores re-open themselves in the worker.

    Args:
        plan: the order.
        stores: opened stores; case numbers run over their manifests one after another.
        class_weights: for each dataset of the task table, the weight of each class in the draw of a foreground class.
        data: patch and split.
        augmentation: ranges and place.
        faults: retries, cap, fault injection.
        retry_limit_s: no further attempt at failing storage begins later than this after a sample's first one.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Store],
        *,
        class_weights: Sequence[npt.NDArray[np.float64]],
        data: DataConfig,
        augmentation: AugmentConfig,
        faults: FaultsConfig,
        retry_limit_s: float = float("inf"),
    ) -> None:
        self.plan = plan
        self.stores = tuple(stores)
        self.class_weights = tuple(class_weights)
        self.patch = data.patch_vox_zyx
        self.augmentation = augmentation
        self.augment_here = augmentation.where != "device"
        """Apply the augmentation where the sample is read; otherwise it is left to the training device."""
        self.faults = faults
        self._retry_limit_s = retry_limit_s
        self.chaos = Chaos(faults.chaos, plan.seed)
        self._first = np.cumsum([0] + [len(s.manifest) for s in stores])

    def read(self, rows: PlanRows, index: int) -> Sample:
        """Read the sample of one row.

        Raises:
            QuarantineLimitError: more cases in a row were unreadable than may be quarantined.
            StreamError: storage kept failing after all attempts.
            HermesError: any other error of the stores; its `events` say what had happened to this sample before.
        """
        events: list[dict[str, Any]] = []
        try:
            return self._read_or_replace(rows, index, events)
        except HermesError as error:
            error.events = events
            raise

    def _read_or_replace(self, rows: PlanRows, index: int, events: list[dict[str, Any]]) -> Sample:
        begin = time.perf_counter()
        group, draw, position = int(rows.group[index]), int(rows.draw[index]), int(rows.position[index])
        case, tried = int(rows.case[index]), dict[int, str]()
        self.chaos.before_sample(position)
        attempt = 0
        while True:
            try:
                sample = self._read_with_retries(rows, index, case, events, begin)
                sample.events = events
                return sample
            except DataError as error:
                tried[case] = str(error)
                if len(tried) > self.faults.max_quarantined:
                    raise self._too_many(tried) from None
                broken = case
                while case in tried:
                    attempt += 1
                    if attempt > 2 * len(self.plan.groups[group].cases):
                        raise self._too_many(tried) from None
                    case = self.plan.substitute(group, draw, attempt)
                events.append(self._event("substitution", position, broken, error=str(error), substitute=self._name(case)[1]))

    def _read_with_retries(self, rows: PlanRows, index: int, case: int, events: list[dict[str, Any]], begin: float) -> Sample:
        """One case, manifest and voxels. Raises DataError at once, StreamError after the last attempt at failing storage."""
        position = int(rows.position[index])

        def note(error: TransientStorageError, attempt: int, pause_s: float) -> None:
            events.append(self._event("retry", position, case, error=str(error), attempt=attempt, pause_s=pause_s))

        try:
            return retried(
                lambda attempt: self._read_case(rows, index, case, attempt, begin),
                self.faults.retries,
                self.faults.backoff_s,
                jitter=lambda attempt: float(uniform(_JITTER, position, attempt)),
                on_retry=note,
                limit_s=self._retry_limit_s,
            )
        except TransientStorageError as error:
            attempts = 1 + sum(event["kind"] == "retry" and event["case"] == case for event in events)
            knob = "faults.retries" if attempts > self.faults.retries else "wait_limit_s, which bounds the attempts"
            raise StreamError(
                f"{self.case_name(case)}: storage failed {attempts} times in {time.perf_counter() - begin:.0f} s: {error}; "
                f"check the storage, or raise stream.{knob}"
            ) from error

    def _read_case(self, rows: PlanRows, index: int, case: int, attempt: int, begin: float) -> Sample:
        """One attempt; `begin` = when the sample's first one began: failed ones, of replaced cases too, are waits for storage."""
        store, row = self.locate(case)
        entry = store.manifest.row(row)
        dataset, position = int(rows.dataset[index]), int(rows.position[index])
        wanted = bool(rows.foreground[index])
        start = choose_start(
            shape=entry.shape_vox_zyx,
            patch=self.patch,
            seed=int(rows.crop_seed[index]),
            weights=self.class_weights[dataset] if wanted else None,
            counts=store.manifest.foreground_counts(row) if wanted else _NOTHING,
            foreground=lambda k: store.manifest.foreground(row, k),
        )
        numbers = augment.draw(int(rows.augment_seed[index]), self.augmentation)
        here = self.augment_here  # another thread may change it meanwhile
        box, scale = _Box(start, self.patch), 1.0
        if numbers.affine is not None:
            box = _Box(
                *augment.source_box(numbers.affine, start, self.patch, entry.shape_vox_zyx),
                reach=augment.reach(numbers.affine, start, self.patch),
                stored=here and entry.image_dtype == "int16",  # half the bytes to move; the warp scales
            )
            scale = entry.image_step if box.stored else 1.0
        decoded_before_s = store.counters.decode_s
        before = {name: getattr(store.counters, name) for name in IO}
        self.chaos.before_read(position, case, attempt, self._name(case))
        image, label = store.read_crop(entry, box.start, box.sides, reach=box.reach, stored=box.stored)
        read, decode_s = time.perf_counter(), store.counters.decode_s - decoded_before_s
        patch_start = (start[0] - box.start[0], start[1] - box.start[1], start[2] - box.start[2])
        sample = Sample(position, dataset, case, identity(*self._name(case), start), image, label, numbers, patch_start)
        sample.io = {name: getattr(store.counters, name) - count for name, count in before.items()}
        if here:
            finish(sample, self.patch, scale)
        sample.parts_s = {
            "storage": max(read - begin - decode_s, 0.0),
            "decode": decode_s,
            "augment": time.perf_counter() - read,
        }
        return sample

    def locate(self, case: int) -> tuple[Store, int]:
        """Store and manifest row of a global case number."""
        index = int(np.searchsorted(self._first, case, side="right")) - 1
        return self.stores[index], case - int(self._first[index])

    def case_name(self, case: int) -> str:
        """`dataset/case_id` of a global case number."""
        return "/".join(self._name(case))

    def _name(self, case: int) -> tuple[str, str]:
        store, row = self.locate(case)
        manifest = store.manifest
        return manifest.dataset_names[int(manifest.dataset_index[row])], manifest.case_id(row)

    def _event(self, kind: str, position: int, case: int, **more: Any) -> dict[str, Any]:
        dataset, case_id = self._name(case)
        return {
            "kind": kind,
            "time_s": round(time.time(), 3),
            "position": position,
            "case": case,
            "dataset": dataset,
            "case_id": case_id,
            **more,
        }

    def _too_many(self, tried: dict[int, str]) -> QuarantineLimitError:
        listed = "; ".join(f"{self.case_name(case)}: {message}" for case, message in list(tried.items())[:5])
        return QuarantineLimitError(
            f"{len(tried)} unreadable cases in a row (stream.faults.max_quarantined = {self.faults.max_quarantined}): {listed}. "
            "Run `hermes-shard verify` on the store and convert these cases again"
        )


def open_pickled(pickled: bytes) -> Reader:
    """A reader in another process: its stores are opened there, which may need more than one attempt.

    Raises:
        StreamError: storage kept failing.
        DataError: a store is damaged.
    """
    try:
        return retried(lambda _: pickle.loads(pickled), OPEN_RETRIES, OPEN_PAUSE_S)
    except TransientStorageError as error:
        raise StreamError(f"a worker could not open the stores in {OPEN_RETRIES + 1} attempts: {error}") from error


def finish(sample: Sample, patch: Vox3, scale: float = 1.0) -> None:
    """Apply a sample's draw in place, on this CPU: after that image and label have the patch's shape.

    `scale`: what an image that is still as it was stored is multiplied by (only with an affine).
    """
    numbers = sample.numbers or augment.Draw()
    if numbers.affine is not None:
        sample.image, sample.label = augment.warp(sample.image, sample.label, numbers.affine, sample.patch_start, patch, scale)
    if not sample.image.flags.writeable or not sample.image.flags.c_contiguous:
        sample.image = sample.image.copy()
    sample.image = augment.change_intensity(sample.image, numbers)
    sample.numbers, sample.patch_start = None, (0, 0, 0)


def identity(dataset: str, case_id: str, start: Vox3) -> int:
    """What was sampled, as a signed 64-bit digest: dataset, case and crop, by name, so that all formats agree."""
    text = f"{dataset}\0{case_id}\0{start[0]},{start[1]},{start[2]}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
