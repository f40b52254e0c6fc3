"""A rank that stays away: the other ends within the limit, names rank, step and operation, and all ranks show their stacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hermes_dist.parallel.alarm import EXIT_HANG
from tests.multiproc.ranks import start_ranks, wait_ranks

TRAIN = "tests.multiproc.train_worker"


@pytest.mark.multiproc
def test_a_collective_that_nobody_joins_ends_with_names_and_all_stacks(tmp_path: Path) -> None:
    options = {"hang": [1, 2, "hung"], "limit_s": 8, "save_every": 1000}
    (code, waited), (hung_code, hung) = wait_ranks(start_ranks(TRAIN, [str(tmp_path), "5", json.dumps(options)], 2), 240)
    assert code == 1
    assert "error: rank 0, step 2," in waited
    assert "did not complete within 8 s" in waited
    assert "stacks of all threads of rank 0 follow" in waited
    assert "Traceback" in waited
    # The rank that everybody waits for shows where it is, and does not stay behind.
    assert hung_code == EXIT_HANG
    assert "hang reported by another rank: rank 0, step 2," in hung
    assert "stacks of all threads of rank 1 follow" in hung
    assert "go_wrong" in hung
