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
        cases += [
            {**base, "steps": 3},
            {**base, "steps": 4, "poison": {"3": "nan"}},
            {**base, "steps": 5, "poison": {"3": "nan"}},
        ]
    results = run_cases(cases, 2, tmp_path)
    for before, at, after in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert at["skipped"] == [False, False, False, True]
        assert at["norm"][-1] == float("inf")
        assert at["weights"] == before["weights"], "a skipped step changed the weights"
        assert at["ema"] == before["ema"], "a skipped step changed the average"
        assert after["skipped"] == [False, False, False, True, False]
        assert after["weights"] != before["weights"]
