"""The Prometheus side: a private registry filled from METRICS, an endpoint per rank, the discovery file, the Pushgateway.

The registry is private, so several runs in one process (tests, sweeps) do not meet. The endpoint binds to loopback unless
told otherwise. `prometheus_targets.json` in the run directory lists the endpoints of all ranks for Prometheus' file_sd; each
rank keeps its own entry under a file lock, which also works for ranks of several hosts on a shared file system. Prometheus
allows a `*` in the last part of a path only, so `runs/.prometheus/RUN.json` links to the file of each run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    delete_from_gateway,
    push_to_gateway,
    start_http_server,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hermes_dist.errors import nearest
from hermes_dist.telemetry.metrics import METRICS, RUN_LABELS

PUSH_EVERY_S = 15.0
PUSH_LIMIT_S = 5.0
TARGETS_FILE = "prometheus_targets.json"
LINKS_DIR = ".prometheus"


class Meters:
    """All metrics of one process. Series appear when first used, so a panel never shows a zero that nobody measured."""

    def __init__(self, run_name: str, rank: int) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._late = _Late()
        self.registry.register(self._late)  # the first one: it is asked before all others
        self._fixed = (run_name, str(rank))
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        for metric in METRICS.values():
            names = (*RUN_LABELS, *metric.labels)
            if metric.kind == "histogram":
                family = Histogram(metric.name, metric.help, names, buckets=metric.buckets, registry=self.registry)
            else:
                family = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, names, registry=self.registry)
            self._families[metric.name] = family
        self._series: dict[tuple[object, ...], Any] = {}

    def series(self, name: str, labels: dict[str, str]) -> Any:
        """The series of a metric. Raises KeyError for a name outside METRICS, ValueError for labels that are not the metric's."""
        key = (name, *labels.items())
        series = self._series.get(key)
        if series is None:
            if name not in METRICS:
                raise KeyError(f"metric {name!r} is not in METRICS.{nearest(name, list(METRICS))}")
            expected = METRICS[name].labels
            if set(labels) != set(expected):
                raise ValueError(f"metric {name!r} has labels {expected}, got {tuple(labels)}")
            series = self._families[name].labels(*self._fixed, *(str(labels[label]) for label in expected))
            self._series[key] = series
        return series

    def before_scrape(self, function: Callable[[], None]) -> None:
        """Call a function before the series are read, for what is dearer than a step should pay. It must be thread-safe."""
        self._late.functions.append(function)

    def watch(self, name: str, function: Callable[[], float], labels: dict[str, str]) -> None:
        """A gauge that is asked for its value when somebody scrapes."""
        self.series(name, labels).set_function(function)


class _Late(Collector):
    """No metrics of its own: brings the others up to date."""

    def __init__(self) -> None:
        self.functions: list[Callable[[], None]] = []

    def collect(self) -> Iterable[Metric]:
        for function in self.functions:
            function()
        return ()


class Endpoint:
    """`http://host:port/metrics` for one rank."""

    def __init__(self, registry: CollectorRegistry, host: str, first_port: int, rank: int, world_size: int) -> None:
        wanted = first_port + rank if first_port > 0 else 0
        self._server, self._thread = _listen(registry, host, wanted, max(world_size, 1))
        self.port = int(self._server.server_port)
        self.host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        if wanted and self.port != wanted:
            print(
                f"rank {rank}: port {wanted} is in use, metrics are at http://{self.host}:{self.port}/metrics",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def _listen(registry: CollectorRegistry, host: str, port: int, stride: int) -> tuple[WSGIServer, threading.Thread]:
    # Strides of the world size keep the ranks of one host out of each other's way; in the end any free port will do.
    ports = [p for p in range(port, port + 20 * stride, stride) if p <= 65535] if port else []
    for candidate in [*ports, 0]:
        try:
            return start_http_server(candidate, addr=host, registry=registry)
        except OSError as error:
            if candidate == 0:
                raise OSError(
                    error.errno, f"cannot serve metrics on host {host!r} ({error}); set monitor.prometheus_host"
                ) from error
    raise AssertionError("unreachable")


class TargetsFile:
    """This rank's entry in `prometheus_targets.json`: `[{"targets": ["host:port"], "labels": {"target_rank": "0"}}, …]`."""

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self._path, self._rank, self._world_size = run_dir / TARGETS_FILE, rank, world_size
        self._address = ""

    def register(self, address: str) -> None:
        """Write this rank's address; entries of ranks beyond the world size (an earlier, larger start) go."""
        self._address = address
        others = {str(rank) for rank in range(self._world_size)} - {str(self._rank)}
        mine = [{"targets": [address], "labels": {"target_rank": str(self._rank)}}]
        self._update(lambda entry: entry["labels"]["target_rank"] in others, mine)
        self._link()

    def remove(self) -> None:
        """Take this endpoint out, so that a finished run is not reported as down.

        By its address: another process that writes to the same run directory may have the entry of this rank by now.
        """
        self._update(lambda entry: entry["targets"] != [self._address], [])

    def _update(self, keep: Callable[[dict[str, Any]], bool], mine: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (self._path.parent / f".{TARGETS_FILE}.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            others = [entry for entry in self._read() if keep(entry)]
            entries = sorted(others + mine, key=lambda e: int(e["labels"]["target_rank"]))
            temporary = self._path.with_suffix(".tmp")
            with temporary.open("w") as file:
                file.write(json.dumps(entries, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)

    def _link(self) -> None:
        run_dir = self._path.parent.absolute()
        links = run_dir.parent / LINKS_DIR
        links.mkdir(exist_ok=True)
        _link_from(links, f"{run_dir.name}.json", Path("..") / run_dir.name / TARGETS_FILE)
        # A member of a sweep lies one folder deeper than other runs; the sweep has made the folder of links above it.
        above = run_dir.parent.parent / LINKS_DIR
        if above.is_dir():
            name = f"{run_dir.parent.name}.{run_dir.name}.json"
            _link_from(above, name, Path("..") / run_dir.parent.name / run_dir.name / TARGETS_FILE)

    def _read(self) -> list[dict[str, Any]]:
        return json.loads(self._path.read_text()) if self._path.is_file() else []


def _link_from(folder: Path, name: str, target: Path) -> None:
    """A link to a targets file; links of deleted runs go."""
    for link in folder.iterdir():
        if not link.exists():  # its run was deleted; Prometheus would complain at every refresh
            link.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):  # another rank was faster, or the run is resumed
        (folder / name).symlink_to(target)


class Pusher:
    """Sends the registry to a Pushgateway every 15 s from a thread: for batch systems where nobody can scrape.

    The gateway keeps what it was given for ever, so the end of a run takes its group out again: else the numbers of a finished
    run would stand still there, and raise the alert of one that hangs.
    """

    def __init__(self, url: str, registry: CollectorRegistry, grouping: dict[str, str], on_error: Callable[[], None]) -> None:
        self._url, self._registry, self._grouping, self._on_error = url, registry, grouping, on_error
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="pushgateway", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:  # the first push at once: a gateway that does not answer is named at the start
            self._try(functools.partial(push_to_gateway, registry=self._registry))
            if self._stop.wait(PUSH_EVERY_S):
                return

    def _try(self, call: Callable[..., None]) -> None:
        try:
            call(self._url, job="hermes", grouping_key=self._grouping, timeout=PUSH_LIMIT_S)
        except Exception as error:  # time-outs, answers that are not HTTP, …: monitoring must not stop a training
            self._on_error()
            if not self._warned:
                print(
                    f"Pushgateway {self._url} does not answer ({error}); training goes on, pushing is tried again",
                    file=sys.stderr,
                    flush=True,
                )
                self._warned = True

    def close(self) -> None:
        """Stop pushing, and delete what was pushed."""
        self._stop.set()
        self._thread.join(timeout=PUSH_LIMIT_S + 1)
        self._try(delete_from_gateway)
