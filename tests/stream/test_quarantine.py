"""The job's set of bad cases: the same on every rank, one line a case, one cap."""

from __future__ import annotations

from typing import Any

import pytest

from hermes_dist.errors import QuarantineLimitError
from hermes_dist.stream.quarantine import Quarantine


def substitution(case: int, position: int) -> dict[str, Any]:
    return {"kind": "substitution", "case": case, "position": position, "error": f"damage {case}"}


def ranks(limit: int, world: int = 2) -> list[Quarantine]:
    return [Quarantine(limit, lambda case: f"set/case{case}") for _ in range(world)]


def test_a_case_is_announced_once_however_many_ranks_find_it() -> None:
    world = ranks(limit=10)
    announced: list[int] = []
    for step in ([[1, 2], [2]], [[2], [1, 3, 3]], [[3], []]):
        own = [rank.find([substitution(case, 0) for case in cases]) for rank, cases in zip(world, step, strict=True)]
        found = [cases for _, cases in own]
        for number, rank in enumerate(world):
            events = rank.settle(own[number][0], found, number)
            announced += [e["case"] for e in events if e["kind"] == "quarantine"]
            assert [e["case"] for e in events if e["kind"] == "substitution"] == step[number]
    assert sorted(announced) == [1, 2, 3]


def test_the_cap_counts_all_ranks_and_stops_all_of_them() -> None:
    world = ranks(limit=3)
    for number, cases in enumerate(([1, 2], [3, 4])):
        world[number].find([substitution(case, 0) for case in cases])
    for number, rank in enumerate(world):
        rank.settle([], [[1, 2], [3]], number)
        rank.check()
        rank.settle([], [[], [4]], number)
        with pytest.raises(
            QuarantineLimitError, match=r"4 unreadable cases on all ranks.*max_quarantined=3: set/case1: "
        ) as error:
            rank.check()
        assert ("damage 1" in str(error.value)) == (number == 0)
        assert "hermes-shard verify" in str(error.value)


def test_what_was_found_before_a_restart_counts_and_is_not_announced_again() -> None:
    first = Quarantine(3, lambda case: f"set/case{case}")
    first.settle([], [first.find([substitution(case, 0) for case in (1, 2, 3)])[1]], 0)
    again = Quarantine(3, lambda case: f"set/case{case}")
    again.restore(first.cases)
    again.check()
    events, fresh = again.find([substitution(1, 5)])
    assert ([e["kind"] for e in events], fresh) == (["substitution"], ())
    again.settle([], [again.find([substitution(4, 6)])[1]], 0)
    with pytest.raises(QuarantineLimitError, match="4 unreadable cases") as error:
        again.check()
    assert error.value.exit_code == 2, "a restart would find the same cases"


def test_cases_are_told_by_dataset_from_before_a_restart_and_at_each_change() -> None:
    told: list[dict[str, int]] = []
    quarantine = Quarantine(9, lambda case: f"{'odd' if case % 2 else 'even'}/with/case{case}")
    quarantine.restore([1, 3])
    quarantine.watch(told.append)
    assert told == [{"odd": 2}]
    quarantine.settle([], [[], []], 0)
    quarantine.settle([], [[1], [3]], 0)
    assert len(told) == 1, "nothing new"
    quarantine.settle([], [[5], [2, 5]], 0)
    assert told[1:] == [{"odd": 3, "even": 1}]
    quarantine.restore([4])
    assert told[2:] == [{"odd": 3, "even": 2}]
