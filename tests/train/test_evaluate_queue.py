"""The queue of an evaluation's workers: everything is computed once, and nothing hangs whoever dies."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from hermes_dist.train.evaluate_queue import WorkQueue


def test_queue_computes_everything_once(tmp_path):
    queue, seen = WorkQueue(tmp_path / "q", 5), []
    queue.prepare()
    queue.work(lambda i: seen.append(i) or {"i": i})
    assert seen == [0, 1, 2, 3, 4]
    assert [r["i"] for r in queue.results()] == seen


def test_worker_zero_takes_over_from_the_dead(tmp_path):
    """Claims without results (a killed worker's) are computed by worker 0; nobody waits."""
    queue = WorkQueue(tmp_path / "q", 4)
    queue.prepare()
    for index in (0, 2):
        (queue.folder / f"{index:06d}.claim").touch()
    queue.work(lambda i: {"i": i}, worker=1)
    assert sorted(p.name for p in queue.folder.glob("*.json")) == ["000001.json", "000003.json"]
    queue.work(lambda i: {"i": i}, worker=0)
    assert [r["i"] for r in queue.results()] == [0, 1, 2, 3]


def test_an_interrupted_queue_goes_on(tmp_path):
    queue = WorkQueue(tmp_path / "q", 4)
    queue.prepare()

    def stop_at_two(i: int) -> dict:
        if i == 2:
            raise KeyboardInterrupt
        return {"i": i}

    with pytest.raises(KeyboardInterrupt):
        queue.work(stop_at_two)
    again, seen = WorkQueue(tmp_path / "q", 4), []
    assert again.prepare() == 2
    again.work(lambda i: seen.append(i) or {"i": i})
    assert seen == [2, 3]


def test_late_workers_of_a_removed_queue_stop(tmp_path):
    queue = WorkQueue(tmp_path / "q", 3)
    queue.prepare()

    def remove_and_answer(i: int) -> dict:
        queue.remove()
        return {"i": i}

    queue.work(remove_and_answer, worker=1)
    assert not queue.folder.exists()


def test_a_queue_stops_between_cases_on_all_workers_and_goes_on(tmp_path):
    """One worker is told; the others see it in the folder, worker 0 too, and nobody takes anything over."""
    queue, seen = WorkQueue(tmp_path / "q", 5), []

    def compute(i: int) -> dict:
        seen.append(i)
        return {"i": i}

    queue.prepare()
    queue.work(compute, worker=1, stop=lambda: len(seen) == 2)
    assert seen == [0, 1]
    for worker in (2, 0):
        queue.work(compute, worker=worker)
    assert seen == [0, 1]
    assert queue.finished == 2
    assert queue.prepare() == 2
    queue.work(compute)
    assert seen == [0, 1, 2, 3, 4]
    assert queue.finished == 5
    queue.remove()
    queue.work(compute, worker=1, stop=lambda: True)
    assert not queue.folder.exists()


def _worker(folder: str, worker: int) -> None:
    def compute(i: int) -> dict:
        if worker == 1 and i == 1:
            os._exit(9)  # dies in the middle of a case
        return {"i": i, "worker": worker}

    WorkQueue(Path(folder), 8).work(compute, worker=worker)


@pytest.mark.multiproc
def test_processes_share_the_work_and_a_death_changes_nothing(tmp_path):
    queue = WorkQueue(tmp_path / "q", 8)
    queue.prepare()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(str(queue.folder), w)) for w in (1, 2, 0)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    assert [r["i"] for r in queue.results()] == list(range(8))
