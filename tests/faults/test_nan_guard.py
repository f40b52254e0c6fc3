"""A loss or gradient that is not finite on one rank: the step is skipped on all ranks, in fp32 too, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multiproc.cases import BASE, run_cases


@pytest.mark.faults
@pytest.mark.multiproc
def test_a_poisoned_rank_makes_all_ranks_skip(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = []
    for stage in (0, 1, 2, 3):
        base = {**BASE, "stage": stage, "optimizer": "lamb", "micro_batch": 1}
        cases += [{**base, "steps": 2}, {**base, "steps": 3, "poison": {"2": "nan"}}]
    cases.append({**BASE, "stage": 1, "optimizer": "adamw", "micro_batch": 1, "steps": 4, "poison": {"2": "inf"}})
    *results, beyond = run_cases(cases, 2, tmp_path)
    for before, at in zip(results[::2], results[1::2], strict=True):
        assert at["skipped"] == [False, False, True]
        assert at["norm"][-1] == float("inf")
        assert at["weights"] == before["weights"], "a skipped step changed the weights"
        assert at["ema"] == before["ema"], "a skipped step changed the average"
    assert beyond["skipped"] == [False, False, True, False], "the step after it is applied"
    assert all(w == w for tensor in beyond["weights"] for w in tensor)
