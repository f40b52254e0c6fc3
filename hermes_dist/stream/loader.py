"""The loader: a rank's samples, cut into the global steps of training.

A feeder thread takes samples from the source (ray or inline), builds whole steps and keeps a few ready; the training loop
takes them from a bounded queue. Every wait has a limit and says what it waited for. The time a rank really waited is measured
and shared out among what the awaited samples spent their time on.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError, HermesError, WaitTimeoutError
from hermes_dist.stream.batch import Collator, StepBatch, local_part, micro_batch_count
from hermes_dist.stream.inline_source import InlineSource
from hermes_dist.stream.prepare import build_reader
from hermes_dist.stream.quarantine import Quarantine
from hermes_dist.stream.reader import IO, Reader, Sample, Store
from hermes_dist.tasks import TaskTable
from hermes_dist.telemetry.metrics import METRICS
from hermes_dist.telemetry.telemetry import Telemetry

POLL_S = 0.5
FEEDER_LIMIT_S = 15.0
JUDGED_STEPS = 50
"""How many steps' waiting decides about the number of workers, and (`augment.where = auto`) once about the augmentation."""
AUTO_SHARE = 0.05
"""`augment.where = auto`: a larger share of waiting moves the augmentation to the training device."""
CAUSES = ("storage", "decode", "augment", "transfer", "queue")
IO_COUNTERS = {
    "bytes_read": "hermes_read_bytes_total",
    "bytes_fetched": "hermes_fetched_bytes_total",
    "cache_hits": "hermes_cache_hits_total",
    "cache_misses": "hermes_cache_misses_total",
}


class Source(Protocol):
    """Samples of this rank, in order."""

    def __iter__(self) -> Generator[Sample]: ...

    def augment_on_device(self) -> None:
        """Leave the augmentation of samples that are not yet under way to the training device."""
        ...

    def scale(self, wait_share: float) -> str | None:
        """Adapt the number of workers to the share of the last steps' time spent waiting; says what was changed."""
        ...

    def waits_for(self) -> str:
        """What a wait for the next sample is a wait for, in words."""
        ...

    def gauges(self) -> dict[str, float]:
        """Values for metrics, by metric name; a counter's is its total so far."""
        ...

    def give_up(self) -> None:
        """End a wait for a sample that does not come, with an error, where that is possible."""
        ...

    def close(self, *, still_read: bool = False) -> None:
        """Release workers and memory; `still_read`: a thread did not stop waiting for a sample."""
        ...


def open_stream(
    config: Config,
    stores: Sequence[Store],
    tasks: TaskTable,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    telemetry: Telemetry | None,
    start_position: int | None = None,
    quarantined: Iterable[int] = (),
) -> Stream:
    """Open this rank's stream of global steps start_step, start_step + 1, … to `train.max_steps`.

    Args:
        start_position: the plan's position of the first sample of `start_step`; None = all steps so far had the same
            `train.global_batch` as now.
        quarantined: cases that were found to be unreadable before the run was resumed.

    Raises:
        ConfigError: whatever can be found wrong before the first step (see `prepare.build_reader`).
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of a world of {world_size}: expected 0 <= rank < world size")
    reader, notes = build_reader(config, stores, tasks)
    shift = 0 if start_position is None else start_position - start_step * config.train.global_batch
    parts = local_ranges(config, rank, world_size, start_step, shift)
    if config.stream.backend == "ray" and config.stream.workers > 0:
        # Imported here so that an inline run neither needs nor loads Ray (a second of start-up).
        from hermes_dist.stream.ray_source import RaySource

        source: Source = RaySource(reader, parts, config.stream, rank=rank, world_size=world_size)
    else:
        source = InlineSource(reader, parts)
    stream = Stream(config, reader, source, tasks, rank=rank, world_size=world_size, start_step=start_step, shift=shift)
    n_cases = sum(len(store.manifest) for store in stores)  # a collection that has changed may hold fewer
    stream.quarantine.restore(case for case in quarantined if case < n_cases)
    stream.start(notes, telemetry)
    return stream


def local_ranges(config: Config, rank: int, world_size: int, start_step: int, shift: int = 0) -> Iterator[range]:
    """Position range of this rank in every global step that is left; `shift`: position of step s less s · global_batch."""
    for step in range(start_step, config.train.max_steps):
        yield range(*local_part(step * config.train.global_batch + shift, config.train.global_batch, rank, world_size))


class Stream:
    """Iterator over a rank's `StepBatch`es; also a context manager. Built by `open_stream`."""

    def __init__(
        self,
        config: Config,
        reader: Reader,
        source: Source,
        tasks: TaskTable,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        shift: int = 0,
    ) -> None:
        self._config = config
        self._reader = reader
        self._source = source
        self._collator = Collator(tasks, config.data.patch_vox_zyx)
        self._rank, self._world_size, self._step, self._shift = rank, world_size, start_step, shift
        self._readers = max(config.stream.workers, config.stream.max_workers or 0, 1) if config.stream.backend == "ray" else 1
        local = max(-(-config.train.global_batch // world_size), 1)
        self._ready: queue.Queue[_Ready | BaseException | None] = queue.Queue(max(config.stream.prefetch // local, 1))
        self._stop = threading.Event()
        self._progress = time.monotonic()
        self._awaited = "the first sample"
        self.quarantine = Quarantine(config.stream.faults.max_quarantined, reader.case_name)
        """Bad cases. A world of one counts its own; with more ranks the caller settles each step's findings."""
        self._thread = threading.Thread(target=self._feed, name="stream-feeder", daemon=True)
        self._telemetry: Telemetry | None = None
        self._notes: list[dict[str, Any]] = []
        self._totals: dict[str, float] = {}
        self._gathered: list[Sample] = []
        self._judged: list[tuple[float, float]] = []
        self._judge_from: float | None = None
        self._place_open = config.augment.where == "auto"

    def start(self, notes: list[dict[str, Any]], telemetry: Telemetry | None) -> None:
        """Begin to read; `notes` become events of the first step."""
        self._notes, self._telemetry = list(notes), telemetry
        if telemetry is not None and (caches := [s.cache for s in self._reader.stores if s.cache is not None]):
            telemetry.watch("hermes_cache_used_bytes", lambda: float(caches[0].counted_bytes()))  # they share one folder
        if telemetry is not None and self._rank == 0:  # the set is the job's: one rank shows it
            telemetry.set("hermes_quarantine_limit_cases", self._config.stream.faults.max_quarantined)
            self.quarantine.watch(telemetry.quarantine)
        self._progress = time.monotonic()
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        while self._step < self._config.train.max_steps:
            yield self._next()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as left:
            # What ended the run matters more than what could not be tidied up; so does that it ended well.
            text = f"{type(left).__name__} while the stream was closed: {left}"
            if error is None:
                print(f"warning: {text}", file=sys.stderr, flush=True)
            else:
                error.add_note(text)

    def close(self) -> None:
        """Stop the feeder, then release workers: a sample that is under way still needs them. Safe to call twice.

        Workers that hang are given up: an interpreter that ends while a thread still reads from Ray can crash, and its exit code,
        which launchers act on, is lost.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=FEEDER_LIMIT_S)
        if self._thread.is_alive():
            print(
                f"warning: no sample for {FEEDER_LIMIT_S:.0f} s while the stream was closed; giving up "
                f"{self._awaited} ({self._source.waits_for()})",
                file=sys.stderr,
                flush=True,
            )
            self._source.give_up()
            self._thread.join(timeout=FEEDER_LIMIT_S)
        self._source.close(still_read=self._thread.is_alive())
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def _next(self) -> StepBatch:
        self.quarantine.check()
        begin = time.perf_counter()
        item = self._wait()
        wait_s = time.perf_counter() - begin
        batch, parts_s = item.batch, item.parts_s
        batch.data_wait_s = wait_s
        batch.wait_parts_s = attribute_wait(wait_s, parts_s, len(batch.positions), self._readers)
        if self._world_size == 1:
            batch.events = self.quarantine.settle(batch.events, [batch.unreadable], 0)
        batch.events = self._notes + batch.events
        self._notes = []
        self._judge(wait_s)
        self._step = batch.step + 1
        self._report(item)
        return batch

    def _judge(self, wait_s: float) -> None:
        """Every JUDGED_STEPS warm steps: more or fewer workers, and whether the augmentation moves (`augment.where = auto`)."""
        now = time.perf_counter()
        if self._judge_from is not None:  # the first step waits for workers to start: it says nothing
            self._judged.append((wait_s, now - self._judge_from))
        self._judge_from = now
        if len(self._judged) < JUDGED_STEPS:
            return
        share = wait_share(self._judged)
        self._judged = []
        notes = [self._source.scale(share)]
        if self._place_open and share > AUTO_SHARE and torch.cuda.is_available():
            self._source.augment_on_device()
            notes.append(f"augment.where=auto: {share:.0%} of {JUDGED_STEPS} steps was waiting; augmenting on the device")
        self._place_open = False
        self._notes += [{"kind": "note", "message": note} for note in notes if note]

    def _wait(self) -> _Ready:
        limit_s, began = self._config.stream.wait_limit_s, time.monotonic()
        while True:
            try:
                item = self._ready.get(timeout=min(POLL_S, limit_s))
            except queue.Empty:
                # While nobody asked (an evaluation) the feeder rested before a full queue: that was no wait.
                silent_s = time.monotonic() - max(self._progress, began)
                if silent_s <= limit_s:
                    continue
                raise WaitTimeoutError(
                    f"rank {self._rank} waited {silent_s:.0f} s for {self._awaited} (step {self._step}, backend "
                    f"{self._config.stream.backend}: for {self._source.waits_for()}), more than stream.wait_limit_s="
                    f"{limit_s:g}; check storage and workers, or raise the limit"
                ) from None
            if isinstance(item, _Ready):
                return item
            raise item if item is not None else WaitTimeoutError(f"the stream was closed before step {self._step}")

    def _feed(self) -> None:
        """Body of the feeder thread. Any error is handed to the training loop, which raises it."""
        try:
            with contextlib.closing(iter(self._source)) as samples:
                for step in range(self._step, self._config.train.max_steps):
                    item = self._assemble(step, samples)
                    if item is None or not self._put(item):
                        return
        except BaseException as error:  # a thread must not die silently: the loop raises what it is given
            if isinstance(error, HermesError):
                error.events = [*(e for sample in self._gathered for e in sample.events), *error.events]
            self._put(error)

    def _put(self, item: _Ready | BaseException) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=POLL_S)
                return True
        return False

    def _assemble(self, step: int, samples: Iterator[Sample]) -> _Ready | None:
        """One step of this rank, or None if the stream was closed meanwhile."""
        size, world = self._config.train.global_batch, self._world_size
        first = step * size + self._shift
        rows = self._reader.plan.rows(first, first + size)
        start, stop = local_part(first, size, self._rank, world)
        mine = self._gathered = list[Sample]()
        for position in range(start, stop):
            self._awaited = f"the sample of position {position}"
            sample = next(samples, None)
            self._progress = time.monotonic()
            if self._stop.is_set():
                return None
            if sample is None or sample.position != position:
                found = "the end" if sample is None else f"position {sample.position}"
                raise AssertionError(f"the source returned {found} where position {position} was due")
            mine.append(sample)
        events, unreadable = self.quarantine.find([e for s in mine for e in s.events])
        begin = time.perf_counter()
        count = micro_batch_count(size, world, self._config.train.micro_batch)
        bounds = [len(mine) * i // count for i in range(count + 1)]
        batches = [self._collator.collate(mine[a:b]) for a, b in itertools.pairwise(bounds)]
        parts_s = {cause: sum(s.parts_s.get(cause, 0.0) for s in mine) for cause in CAUSES}
        parts_s["transfer"] += time.perf_counter() - begin
        batch = StepBatch(
            step=step,
            micro_batches=batches,
            pair_count=int(self._collator.pairs[rows.dataset].sum()),
            modality_count=int((self._collator.modality_targets[rows.dataset] >= 0).sum()),
            identities=np.asarray([s.identity for s in mine], np.int64),
            positions=np.arange(start, stop, dtype=np.int64),
            cases=[self._reader.case_name(s.case) for s in mine],
            events=events,
            unreadable=unreadable,
        )
        return _Ready(batch, parts_s, {name: sum(s.io.get(name, 0) for s in mine) for name in IO})

    def _report(self, item: _Ready) -> None:
        if self._telemetry is None:
            return
        for stage in ("storage", "decode", "augment", "transfer"):
            self._telemetry.add("hermes_sample_stage_seconds_total", item.parts_s[stage], stage=stage)
        for name, metric in IO_COUNTERS.items():
            self._telemetry.add(metric, item.io[name])
        local = max(-(-self._config.train.global_batch // self._world_size), 1)
        self._telemetry.set("hermes_ready_samples", self._ready.qsize() * local)
        self._telemetry.set("hermes_queue_limit_samples", self._ready.maxsize * local)
        for name, value in self._source.gauges().items():
            if METRICS[name].kind == "counter":
                self._telemetry.add(name, max(value - self._totals.get(name, 0.0), 0.0))
                self._totals[name] = value
            else:
                self._telemetry.set(name, value)


class _Ready:
    """A finished step, the seconds its samples spent in each stage, and what their reading took (IO)."""

    def __init__(self, batch: StepBatch, parts_s: dict[str, float], io: dict[str, int]) -> None:
        self.batch, self.parts_s, self.io = batch, parts_s, io


def wait_share(steps: Sequence[tuple[float, float]]) -> float:
    """Share of the steps' time spent waiting for samples.

    Args:
        steps: (seconds waited, seconds from one step's samples to the next one's). A step that an evaluation or a checkpoint made
            longer counts as an ordinary one: the samples that were read meanwhile cost nobody a wait.
    """
    typical_s = float(np.median([took - waited for waited, took in steps]))
    waited_s = sum(waited for waited, _ in steps)
    return waited_s / max(waited_s + typical_s * len(steps), 1e-9)


def attribute_wait(wait_s: float, parts_s: dict[str, float], n_samples: int, at_once: int = 1) -> dict[str, float]:
    """Share a wait out among causes; the values sum to `wait_s`.

    Args:
        wait_s: seconds the training loop really waited.
        parts_s: seconds that the awaited samples spent in each stage, over all of them.
        n_samples: how many samples that were.
        at_once: how many of them were worked on at the same time (workers).

    Returns:
        The wait in proportion to the stages, but no stage more than it took; what is left is `queue`: nobody was working on
        the samples (workers starting, tasks being scheduled).
    """
    workers = max(min(at_once, n_samples), 1)
    busy_s = sum(parts_s.values()) / workers if n_samples else 0.0
    factor = min(wait_s / busy_s, 1.0) if busy_s > 0 else 0.0
    shared = {cause: parts_s.get(cause, 0.0) / workers * factor for cause in CAUSES if cause != "queue"}
    return {**shared, "queue": max(wait_s - sum(shared.values()), 0.0)}
