"""The ray source: one ordered Ray Data pipeline per rank, over this rank's positions.

Each pipeline is a Ray Data source of its own: a read task takes the positions of a few samples, runs the reader on them and
yields blocks of a few samples, in order (`preserve_order`). The plan owns the order; Ray is asked for nothing but doing the work,
elsewhere and in parallel, and the loader checks that what comes back is what was due. A pipeline covers a segment of
the run; the next one is started before the last has ended.

Workers are Ray tasks, not actors: a killed worker costs the samples it was working on, which Ray reads again, and idle
worker processes keep their opened stores from one pipeline to the next.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import pickle
import shutil
import tempfile
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray.data import DataContext, Datasource, ReadTask, read_datasource
from ray.data.block import Block, BlockMetadata
from ray.exceptions import RayError

from hermes_dist.config import StreamConfig
from hermes_dist.errors import HermesError, StreamError, WaitTimeoutError
from hermes_dist.stream.inline_source import read_run
from hermes_dist.stream.ray_blocks import decode_block, encode_block, encode_error
from hermes_dist.stream.ray_cluster import Cluster, local_place, quiet_ray
from hermes_dist.stream.ray_gauges import ClusterGauges
from hermes_dist.stream.ray_pace import give_up, pace_for
from hermes_dist.stream.reader import Reader, Sample, open_pickled
from hermes_dist.stream.starter import Starter
from hermes_dist.volume import augment

TASK_BYTES = 64 << 20
BLOCK_BYTES = 24 << 20
"""Of the samples that travel together: Ray's scheduling of a block costs as much CPU as half of what reading a 96³ patch does."""
MIN_ROWS_PER_TASK, MAX_ROWS_PER_TASK = 4, 16
"""Samples per Ray task: they share the cost of scheduling one (about 10 ms of the driver's CPU), and are read again together."""
FIRST_SEGMENT_ROWS = 256
SEGMENT_ROWS, SCALING_SEGMENT_ROWS = 2048, 512
"""Samples per pipeline, and per pipeline where the number of workers may change from one to the next. Starting one costs about a
millisecond a task, so that the first one is short."""

CLOSE_LIMIT_S = 60.0
SCARCE, PLENTY = 0.05, 0.005
"""Shares of the steps' time spent waiting for samples: above the first more workers help, below the second fewer do."""

READ_WHILE_STARTING = True
"""Read in the training process until Ray has started (tests switch it off)."""

_readers: dict[str, Reader] = {}


class RaySource:
    """Yields the samples of a sequence of position ranges, in order, read by Ray workers.

    A cluster needs seconds to start, and so does the first pipeline. Meanwhile this process reads for itself, so that training
    begins at once. They are the same samples, whoever reads them.

    Args:
        reader: sent to the workers once.
        parts: this rank's positions, range by range.
        config: `stream` section: workers, prefetch, object store.
        rank, world_size: for the place of this process on its host (see `ray_cluster.local_place`).
    """

    def __init__(self, reader: Reader, parts: Iterator[range], config: StreamConfig, *, rank: int, world_size: int) -> None:
        quiet_ray()
        self._config = config
        self._name = uuid.uuid4().hex
        self._reader = reader
        self._first = next(parts, range(0))
        self._positions = (p for part in parts for p in part)
        self._place = local_place(rank, world_size)
        self._workers = config.workers
        self._workers_in_use = config.workers
        self._most_workers = max(config.workers, config.max_workers or 0)
        self._expect_samples(reader.augment_here)
        self._kill_dir = tempfile.mkdtemp(prefix="hermes-chaos-") if config.faults.chaos.get("kill") else None
        # One rank speaks for a cluster: the first of the host, or of the run where the cluster is not ours.
        self._speaks = self._place[0] == 0 if config.ray_address == "local" else rank == 0
        self._gauges: ClusterGauges | None = None
        self._cluster: Cluster | None = None
        self._reader_ref: Any = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Linux ends the cluster's processes with the thread that started them: this one, which lives until `close` has ended.
        self._starter = Starter("ray-start")
        self._started = self._starter.submit(self._start)
        self._following: Future[Pipeline | None] = Future()

    def _expect_samples(self, augmented: bool) -> None:
        """Set the size of a sample, and how many make a task: what is augmented later is sent as a larger box."""
        vox = np.prod(self._reader.patch) if augmented else augment.largest_box_vox(self._reader.augmentation, self._reader.patch)
        self._sample_bytes = int(vox) * 6
        self._task_rows = min(max(TASK_BYTES // self._sample_bytes, MIN_ROWS_PER_TASK), MAX_ROWS_PER_TASK)

    def __iter__(self) -> Generator[Sample]:
        yield from read_run(self._reader, self._first)
        try:
            yield from self._from_workers()
        except RayError as error:
            raise StreamError(f"Ray failed: {error}; see its logs, or set stream.backend=inline") from error

    def _from_workers(self) -> Generator[Sample]:
        here: list[int] = []
        if READ_WHILE_STARTING:
            while not self._started.done() and (position := next(self._positions, None)) is not None:
                yield self._read(position)
            here = list(islice(self._positions, max(self._early(), self._config.prefetch)))
        self._started.result()
        self._following = self._starter.submit(self._open, FIRST_SEGMENT_ROWS)
        yield from map(self._read, here)  # while the first pipeline starts
        while (current := self._following.result()) is not None:
            with contextlib.closing(current):
                samples = iter(current)
                yield from islice(samples, current.rows - min(current.rows // 2, self._early()))
                fixed = self._most_workers == self._config.workers
                self._following = self._starter.submit(self._open, SEGMENT_ROWS if fixed else SCALING_SEGMENT_ROWS)
                yield from samples

    def _early(self) -> int:
        """Samples that are read while a pipeline starts."""
        return 4 * self._task_rows * self._workers

    def _read(self, position: int) -> Sample:
        """One sample, read in this process."""
        return next(read_run(self._reader, range(position, position + 1)))

    def augment_on_device(self) -> None:
        """From the next pipeline on leave the augmentation to the training device."""
        self._reader.augment_here = False
        self._expect_samples(augmented=False)
        with self._lock:
            if self._cluster is not None:
                self._reader_ref = self._send_reader()

    def scale(self, wait_share: float) -> str | None:
        """From the next pipeline on use more workers while the rank waits, fewer while it never does; says so if that changes.

        The bounds are `stream.workers` and `stream.max_workers`. Until the last change is in use, a wait says nothing about it.
        """
        before = self._workers
        if self._workers_in_use != before:
            return None
        self._workers = wanted_workers(before, self._config.workers, self._most_workers, wait_share)
        if self._workers == before:
            return None
        return f"{wait_share:.1%} of the last steps was waiting for samples: {self._workers} workers instead of {before}"

    def waits_for(self) -> str:
        """What a wait for the next sample is a wait for, in words."""
        if not self._started.done():
            return "the Ray cluster to start"
        if not self._following.done():
            return "a Ray Data pipeline to deliver its first sample"
        return f"{self._workers} Ray workers to read it"

    def gauges(self) -> dict[str, float]:
        """Workers and object store, by metric name, on the rank that speaks for the cluster; empty until Ray has started."""
        return self._gauges.values() if self._gauges is not None else {}

    def give_up(self) -> None:
        """End the pipelines although somebody reads them: the reader gets an error, even if the workers hang."""
        give_up(self._name)

    def close(self, *, still_read: bool = False) -> None:
        """Stop the pipelines and leave (or end) the cluster. The iterator must be closed before: Ray stops what nobody reads.

        A pipeline that is `still_read` would take the process down if Ray ended before it: then Ray is left to its reaper.

        Raises:
            WaitTimeoutError: Ray did not end within CLOSE_LIMIT_S, or a pipeline did not stop.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._following.cancel()
        if still_read:
            atexit.unregister(ray.shutdown)
            raise WaitTimeoutError("a Ray pipeline did not stop; Ray's processes end with this one")
        ended = self._starter.submit(self._leave)
        self._starter.finish()
        try:
            ended.result(CLOSE_LIMIT_S)
        except TimeoutError:
            raise WaitTimeoutError(
                f"Ray did not end within {CLOSE_LIMIT_S:.0f} s; what is left of it ends with this process "
                "(`ray stop --force` on this host, if not)"
            ) from None
        finally:
            if self._kill_dir:
                shutil.rmtree(self._kill_dir, ignore_errors=True)

    def _leave(self) -> None:
        """End a pipeline that nobody read, then the cluster. Runs after all that was asked of the starter's thread.

        In this order: a pipeline that outlives Ray takes the whole process down (a failed check in its C++ part).
        """
        if self._following.done() and not self._following.cancelled() and self._following.exception() is None:
            unread = self._following.result()
            if unread is not None:
                unread.close()
        self._following = Future()
        with self._lock:
            cluster, self._cluster, self._reader_ref = self._cluster, None, None
        if self._gauges is not None:
            self._gauges.stop()
        if cluster is not None:
            cluster.close()

    def _start(self) -> None:
        """Start or join the cluster, and send it the reader. Runs beside the first steps."""
        local_rank, local_world_size = self._place
        cluster = Cluster(self._config, local_rank=local_rank, local_world_size=local_world_size, abandoned=self._closed)
        with self._lock:
            self._cluster = cluster
            if not self._closed.is_set():
                self._reader_ref = self._send_reader()
                self._gauges = ClusterGauges() if self._speaks else None

    def _send_reader(self) -> Any:
        sent = copy.copy(self._reader)
        sent.chaos = copy.copy(self._reader.chaos)
        sent.chaos.kill_dir = self._kill_dir  # only workers are ever killed
        # As bytes: what goes wrong while a worker opens the stores is then ours to see, and to try again.
        return ray.put(pickle.dumps(sent))

    def _open(self, rows: int) -> Pipeline | None:
        """Start a pipeline over the next `rows` positions, and wait for its first block.

        Returns:
            The pipeline; None where no position is left, or nobody needs more.
        """
        positions = list(islice(self._positions, rows))
        if not positions or self._closed.is_set():
            return None
        self._workers_in_use = self._workers
        tasks = list(_runs(positions, self._task_rows))
        context: Any = DataContext.get_current()
        options = context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=self._buffer_bytes())
        block_rows = self._block_rows()
        # Ray joins blocks up to this size, and cuts those above one and a half of it: ours, of 5 or 6 bytes a voxel, are neither
        # (boxes for the device are smaller than their bound, and may be joined).
        context.target_max_block_size = block_rows * self._sample_bytes * 3 // 4
        context._max_num_blocks_in_streaming_gen_buffer = -(-self._ahead() // block_rows)  # Ray has no public name for it
        context.custom_execution_callback_classes = [pace_for(self._name)]
        dataset = read_datasource(
            PlanSource(self._reader_ref, tasks, self._sample_bytes, block_rows),
            concurrency=self._workers,
            override_num_blocks=len(tasks),
            num_cpus=1,
        )
        return Pipeline(len(positions), dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))

    def _buffer_bytes(self) -> int:
        """What finished samples may take up in the object store, within half of this rank's part of it."""
        wanted = (self._config.prefetch + 2 * self._task_rows * self._workers) * self._sample_bytes
        return min(wanted, (self._config.object_store_mib << 20) // 2)

    def _block_rows(self) -> int:
        """Samples per block: as many as BLOCK_BYTES hold, and no more than a quarter of what each worker may leave unread."""
        room = min(BLOCK_BYTES, self._buffer_bytes() // (4 * self._workers))
        return min(max(room // self._sample_bytes, 1), self._task_rows)

    def _ahead(self) -> int:
        """Samples that a worker may finish before the scheduling loop has taken the first: a task's, within half of the buffer.

        Ray's own two let a worker idle through most of each rest of the loop (`Pace`).
        """
        return min(max(self._buffer_bytes() // (2 * self._workers * self._sample_bytes), 2), self._task_rows)


class Pipeline:
    """A started pipeline over `rows` samples. Iterate once; close before Ray ends."""

    def __init__(self, rows: int, batches: Iterable[Any]) -> None:
        self.rows = rows
        self._batches = iter(batches)
        self._first: Any = next(self._batches)  # a pipeline begins to run when its first block is asked for

    def __iter__(self) -> Iterator[Sample]:
        first, self._first = self._first, None
        yield from decode_block(first)
        del first
        for block in self._batches:
            yield from decode_block(block)

    def close(self) -> None:
        """Stop its tasks. Safe to call twice."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class PlanSource(Datasource):
    """A Ray Data source whose read tasks are runs of plan positions."""

    def __init__(self, reader_ref: Any, tasks: list[range], sample_bytes: int, block_rows: int) -> None:
        super().__init__()
        self._block_rows = block_rows
        self._reader_ref = reader_ref
        self._tasks = tasks
        self._sample_bytes = sample_bytes

    def get_name(self) -> str:
        """Name in Ray's logs."""
        return "HermesPlan"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples."""
        return self._sample_bytes * sum(len(t) for t in self._tasks)

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """One task per run, whatever parallelism Ray proposes: the order of tasks is the order of positions."""
        del parallelism, per_task_row_limit, data_context
        return [ReadTask(_Read(self._reader_ref, run, self._block_rows), self._metadata(len(run))) for run in self._tasks]

    def _metadata(self, rows: int) -> BlockMetadata:
        return BlockMetadata(num_rows=rows, size_bytes=rows * self._sample_bytes, input_files=None, exec_stats=None)


class _Read:
    """What a Ray worker runs: read a run of positions, a few to a block."""

    def __init__(self, reader_ref: Any, positions: range, block_rows: int) -> None:
        self._reader_ref = reader_ref
        self._positions = positions
        self._block_rows = block_rows

    def __call__(self) -> Iterable[Block]:
        held, failed = list[Sample](), None
        try:
            for sample in read_run(_reader(self._reader_ref), self._positions):
                held.append(sample)
                if len(held) == self._block_rows:
                    yield encode_block(held)
                    held = []
        except HermesError as error:
            failed = error
        if held:
            yield encode_block(held)
        if failed is not None:
            # Ray would turn it into a traceback of its own class; as a row it arrives as what it is.
            yield encode_error(failed)


def _reader(ref: Any) -> Reader:
    key = ref.hex()
    if key not in _readers:
        _readers.clear()  # a worker serves one run at a time; an older run's stores only hold memory
        _readers[key] = open_pickled(ray.get(ref, timeout=60))
    return _readers[key]


def wanted_workers(now: int, least: int, most: int, wait_share: float) -> int:
    """Half as many more where the rank waits for more than SCARCE of its time, one less where it waits for less than PLENTY."""
    if wait_share > SCARCE:
        return min(-(-now * 3 // 2), most)
    return max(now - 1, least) if wait_share < PLENTY else now


def _runs(positions: list[int], longest: int) -> Iterator[range]:
    """Cut positions into runs of consecutive ones, at most so long."""
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or i - start == longest or positions[i] != positions[i - 1] + 1:
            yield range(positions[start], positions[i - 1] + 1)
            start = i
