"""Runs jobs in this process or on Ray, with bounded memory, and survives workers that die.

Jobs are handed out as memory allows: each states how many bytes it may need at its peak, and the sum in flight stays below the
budget (one job always may run). A worker that dies (out of memory, killed) costs a retry of its job; dying twice rejects the
case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from data_tools.findings import Finding
from data_tools.jobs import Job, Outcome, Target, run_job
from hermes_dist.errors import HermesError

MEMORY_SHARE = 0.6
OBJECT_STORE_BYTES = 100 << 20
CRASHES_ALLOWED = 1


def memory_budget_bytes() -> int:
    """How much all jobs in flight may need together: a share of what is free now."""
    return int(psutil.virtual_memory().available * MEMORY_SHARE)


def run_jobs(
    jobs: Sequence[Job],
    target: Target | None,
    *,
    workers: int,
    ray_address: str = "local",
    peak_bytes: Callable[[Job], int] = lambda _: 0,
) -> Iterator[Outcome]:
    """Outcomes in order of completion.

    Args:
        jobs: the cases.
        target: where cases go, or None to check only.
        workers: how many Ray workers.
        ray_address: `local` starts Ray here and stops it at the end; else a cluster's address.
        peak_bytes: memory a job may need.
    """
    started_here = not ray.is_initialized()
    if started_here:
        start_ray(workers, ray_address)
    try:
        yield from _on_ray(jobs, target, workers, peak_bytes)
    finally:
        if started_here:
            ray.shutdown()


def start_ray(workers: int, address: str) -> None:
    """Start Ray on this machine with as many slots as workers, or connect to a cluster."""
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
        )
    else:
        ray.init(address=address, log_to_driver=False)


def _remote_job(job: Job, target: Target | None) -> Outcome:
    return run_job(job, target)


def _on_ray(jobs: Sequence[Job], target: Target | None, workers: int, peak_bytes: Callable[[Job], int]) -> Iterator[Outcome]:
    remote = ray.remote(num_cpus=1, max_retries=0)(_remote_job)
    shared = ray.put(target)
    waiting = list(reversed(jobs))
    crashes: dict[tuple[str, str], int] = {}
    in_flight: dict[Any, tuple[Job, int]] = {}
    budget = memory_budget_bytes()
    while waiting or in_flight:
        while waiting and len(in_flight) < workers:
            need = peak_bytes(waiting[-1])
            if in_flight and sum(n for _, n in in_flight.values()) + need > budget:
                break
            job = waiting.pop()
            in_flight[remote.remote(job, shared)] = (job, need)
        done, _ = ray.wait(list(in_flight), num_returns=1)
        job, _need = in_flight.pop(done[0])
        try:
            yield ray.get(done[0])
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, HermesError) else error from None
        except (WorkerCrashedError, RayError) as error:
            crashes[job.key] = crashes.get(job.key, 0) + 1
            if crashes[job.key] <= CRASHES_ALLOWED:
                waiting.append(job)
                continue
            message = f"the worker died {crashes[job.key]} times on this case ({type(error).__name__})"
            hint = "convert with fewer workers or more memory; if that does not help the file is damaged"
            finding = Finding("worker died", "reject", message, hint, str(job.case.image_path), *job.key)
            yield Outcome(*job.key, "rejected", [finding])
