"""Cases that the job has taken out of training: counted over all ranks, listed by name, capped.

Each rank finds bad cases for itself and replaces them alike, without talking to the others. What they share is the count: the
training loop gathers each step's findings, so that all ranks see the same set after the same step and stop together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hermes_dist.errors import QuarantineLimitError

LISTED = 10


class Quarantine:
    """The job's set of bad cases, the same on every rank.

    Args:
        limit: `stream.faults.max_quarantined`.
        name_of: case number → `dataset/case_id`.
    """

    def __init__(self, limit: int, name_of: Callable[[int], str]) -> None:
        self._limit = limit
        self._name_of = name_of
        self._cases: set[int] = set()
        self._errors: dict[int, str] = {}
        self._on_change: Callable[[dict[str, int]], None] | None = None

    def watch(self, on_change: Callable[[dict[str, int]], None]) -> None:
        """Call `on_change` with the number of cases of each dataset that has some: now, and whenever cases come in."""
        self._on_change = on_change
        self._tell()

    @property
    def cases(self) -> list[int]:
        """Case numbers, for a checkpoint."""
        return sorted(self._cases)

    def restore(self, cases: Iterable[int]) -> None:
        """Go on with the cases of a checkpoint: they count, and are not announced again."""
        for case in cases:
            self._cases.add(case)
            self._errors[case] = "found before this run was resumed, see stream.jsonl"
        self._tell()

    def find(self, events: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
        """This rank's events of a step, with one `quarantine` before the first `substitution` of each case, and those cases."""
        complete: list[dict[str, Any]] = []
        fresh: list[int] = []
        for event in events:
            if event["kind"] == "substitution" and event["case"] not in self._errors:
                self._errors[event["case"]] = str(event["error"])
                fresh.append(event["case"])
                complete.append({**event, "kind": "quarantine"})
            complete.append(event)
        return complete, tuple(fresh)

    def settle(self, events: Sequence[dict[str, Any]], found: Sequence[Sequence[int]], rank: int) -> list[dict[str, Any]]:
        """Add what all ranks found in a step.

        Args:
            events: this rank's events of the step.
            found: cases per rank, in rank order.
            rank: this rank.

        Returns:
            The events, with the `quarantine` of each case on one rank only: the first that found it.
        """
        mine: set[int] = set()
        before = len(self._cases)
        for finder, cases in enumerate(found):
            fresh = set(cases) - self._cases
            self._cases |= fresh
            if finder == rank:
                mine = fresh
        if len(self._cases) > before:
            self._tell()
        return [e for e in events if e["kind"] != "quarantine" or e["case"] in mine]

    def check(self) -> None:
        """Raises QuarantineLimitError if the job has more bad cases than it may."""
        if len(self._cases) <= self._limit:
            return
        listed = "; ".join(
            f"{self._name_of(case)}: {self._errors.get(case, 'found by another rank, see stream.jsonl')}"
            for case in sorted(self._cases)[:LISTED]
        )
        raise QuarantineLimitError(
            f"{len(self._cases)} unreadable cases on all ranks, more than stream.faults.max_quarantined={self._limit}: {listed}. "
            "Run `hermes-shard verify` on the store, convert these cases again, or raise the limit"
        )

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(dict(Counter(self._name_of(case).partition("/")[0] for case in self._cases)))
