"""A rank that stays away: the other ends within the limit and names rank, step and operation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.multiproc.ranks import start_ranks

TRAIN = "tests.multiproc.train_worker"


@pytest.mark.multiproc
def test_a_collective_that_nobody_joins_ends_with_names(tmp_path: Path) -> None:
    options = {"hang": [1, 2, "hung"], "limit_s": 8, "save_every": 1000}
    waiting, hanging = start_ranks(TRAIN, [str(tmp_path), "5", json.dumps(options)], 2)
    try:
        output, _ = waiting.communicate(timeout=240)
    finally:
        for process in (waiting, hanging):
            process.kill()
            process.wait()
    assert waiting.returncode == 1
    assert "error: rank 0, step 2," in output
    assert "did not complete within 8 s" in output
