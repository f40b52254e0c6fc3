"""One object that every room reports to, and the sinks behind it: JSONL, Prometheus, Pushgateway, TensorBoard.

The room's trade-off: cheap calls in the hot loop (microseconds; `hermes_telemetry_seconds_total` proves it), everything that
can be asked for later (memory, disk, checkpoint age) is measured when somebody scrapes. It does not aggregate over ranks:
each rank exports its own numbers and PromQL adds them up.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from hermes_dist.config import MonitorConfig
from hermes_dist.tasks import DatasetTasks
from hermes_dist.telemetry import rows
from hermes_dist.telemetry.jsonl import JsonlFile
from hermes_dist.telemetry.prometheus import Endpoint, Meters, Pusher, TargetsFile

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENT_COUNTERS = {
    "quarantine": "hermes_quarantined_cases_total",
    "substitution": "hermes_substitutions_total",
    "retry": "hermes_storage_retries_total",
}


class Telemetry:
    """The metrics of one rank.

    Args:
        run_dir: the run directory; `metrics.jsonl`, `stream.jsonl` and `prometheus_targets.json` are written there.
        config: the `monitor` section.
        rank: this process; rank 0 alone writes `metrics.jsonl` and TensorBoard events.
        world_size: ranks of the run.
        run_name: label `run` of every metric.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        rank: int = 0,
        world_size: int = 1,
        run_name: str = "run",
    ) -> None:
        self._run_dir, self._rank = Path(run_dir), rank
        self._meters = Meters(run_name, rank)
        self._datasets = rows.DatasetTally(self._meters)
        self._metrics_file = JsonlFile(self._run_dir / "metrics.jsonl") if rank == 0 else None
        self._events_file = JsonlFile(self._run_dir / "stream.jsonl")
        self._tensorboard_on = config.tensorboard and rank == 0
        self._tensorboard: SummaryWriter | None = None
        self._endpoint: Endpoint | None = None
        self._targets = TargetsFile(self._run_dir, rank, world_size)
        self._pusher: Pusher | None = None
        self._extend: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
        if config.prometheus_port >= 0:
            self._endpoint = Endpoint(self._meters.registry, config.prometheus_host, config.prometheus_port, rank, world_size)
            self._targets.register(f"{self._endpoint.host}:{self._endpoint.port}")
        if config.pushgateway:
            grouping = {"run": run_name, "rank": str(rank)}
            self._pusher = Pusher(
                config.pushgateway, self._meters.registry, grouping, lambda: self.add("hermes_telemetry_errors_total")
            )
        self._watch_machine()

    @property
    def address(self) -> str | None:
        """`host:port` of the metrics endpoint, or None where it is off."""
        return f"{self._endpoint.host}:{self._endpoint.port}" if self._endpoint else None

    def declare(self, datasets: Sequence[DatasetTasks]) -> None:
        """Start the counters of the datasets that have a share of the samples, and of their classes, at zero.

        One that is never trained is seen to be silent.

        So are the counters of faults: PromQL's `increase` does not see a series that begins with its first fault.
        """
        self.add("hermes_checkpoint_failures_total", 0)
        for kind, name in EVENT_COUNTERS.items():
            self.add("hermes_stream_events_total", 0, kind=kind)
            for dataset in datasets:
                self.add(name, 0, dataset=dataset.name)
        for dataset in datasets:
            if self._rank == 0:
                self.set("hermes_quarantine_cases", 0, dataset=dataset.name)
            self.add("hermes_dataset_samples_total", 0, dataset=dataset.name)
            for name in dataset.class_names:
                for metric in rows.PAIRS.values():
                    self.add(metric, 0, dataset=dataset.name, task=name)

    def extend(self, function: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Add the keys that `function` computes from a row (FLOPs, utilisation) to each later one."""
        self._extend = function

    def resume(self, next_step: int) -> None:
        """Drop the rows of `next_step` and later, which are trained again, so that each step appears once. Call before `step`."""
        if self._metrics_file:
            self._metrics_file.keep_steps_before(next_step)

    def step(self, row: Mapping[str, Any]) -> None:
        """One finished step: a line of metrics.jsonl (rank 0), and metrics. `rows` documents the keys; others are welcome."""
        start = time.perf_counter()
        if self._extend:
            row = {**row, **self._extend(row)}
        if self._metrics_file:
            self._metrics_file.append(row)
        rows.record(row, self._meters)
        self._datasets.add(row)
        if self._tensorboard_on:
            self._write_tensorboard(row)
        self.add("hermes_telemetry_seconds_total", time.perf_counter() - start)

    def evaluation(self, split: str, report: Mapping[str, Any]) -> None:
        """The scores of `evaluation/<split>.json` (its `mean` and `per_class` entries) become gauges."""
        rows.record_evaluation(split, report, self._meters)

    def quarantine(self, cases: Mapping[str, int]) -> None:
        """How many cases of each dataset are out of training now; a dataset that is left out keeps its number."""
        for dataset, count in cases.items():
            self.set("hermes_quarantine_cases", count, dataset=dataset)

    def event(self, row: Mapping[str, Any]) -> None:
        """A line of stream.jsonl with time and rank, counted by `kind`: quarantine, substitution and retry also by `dataset`."""
        self._events_file.append({"time_s": round(time.time(), 3), "rank": self._rank, **row})
        kind = str(row.get("kind", "other"))
        self.add("hermes_stream_events_total", kind=kind)
        if kind in EVENT_COUNTERS:
            self.add(EVENT_COUNTERS[kind], dataset=str(row.get("dataset", "")))

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Increase a counter of METRICS."""
        self._meters.series(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of METRICS."""
        self._meters.series(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram of METRICS."""
        self._meters.series(name, labels).observe(value)

    def watch(self, name: str, function: Callable[[], float], **labels: str) -> None:
        """A gauge that is asked for its value at each scrape: free in between. `function` must be quick and thread-safe."""
        self._meters.watch(name, function, labels)

    def close(self) -> None:
        """Flush and close all sinks; the endpoint leaves `prometheus_targets.json`, the pushed group the Pushgateway."""
        if self._pusher:
            self._pusher.close()
        if self._endpoint:
            self._targets.remove()
            self._endpoint.close()
            self._endpoint = None
        if self._tensorboard:
            self._tensorboard.close()
        for file in (self._metrics_file, self._events_file):
            if file:
                file.close()

    def _watch_machine(self) -> None:
        process, run_dir = psutil.Process(), self._run_dir
        self.watch("hermes_memory_bytes", lambda: float(process.memory_info().rss), kind="rss")
        self.watch("hermes_memory_bytes", lambda: float(psutil.virtual_memory().available), kind="host_available")
        self.watch("hermes_memory_bytes", lambda: _device_memory("memory_allocated"), kind="device_allocated")
        self.watch("hermes_memory_bytes", lambda: _device_memory("max_memory_allocated"), kind="device_peak")
        self.watch("hermes_disk_free_bytes", lambda: float(shutil.disk_usage(run_dir).free))
        self.watch("hermes_disk_size_bytes", lambda: float(shutil.disk_usage(run_dir).total))

    def _write_tensorboard(self, row: Mapping[str, Any]) -> None:
        if self._tensorboard is None:
            # Imported when wanted: it takes seconds. `purge_step` hides the steps that a killed run wrote after its checkpoint.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=int(row["step"]))
        for name, value in rows.scalars(row):
            self._tensorboard.add_scalar(name, value, int(row["step"]))


def _device_memory(function: str) -> float:
    # Asked for at a scrape: never imports torch nor creates a CUDA context by itself.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return float(getattr(cuda, function)()) if cuda is not None and cuda.is_initialized() else 0.0
