"""Stop and go on: bitwise in the same world, to rounding in another world or ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_dist.parallel.checkpoint import list_checkpoints
from tests.multiproc.cases import BASE, reference, run_cases
from tests.multiproc.ranks import run_ranks, start_ranks, wait_ranks
from tests.multiproc.train_worker import read_losses

STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("lamb", "adamw")
STOP, END = 4, 8


def case(stage: int, optimizer: str, **more: Any) -> dict[str, Any]:
    return {**BASE, "steps": END, "stage": stage, "optimizer": optimizer, "micro_batch": 1, **more}


@pytest.mark.multiproc
def test_resume_in_the_same_world_is_bitwise(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = []
    for stage in STAGES:
        optimizer = OPTIMIZERS[stage % 2]
        run = {"run": str(tmp_path / f"run{stage}"), "background": stage % 2 == 0}
        cases += [
            case(stage, optimizer),
            case(stage, optimizer, **run, steps=STOP, save_at=[STOP]),
            case(stage, optimizer, **run, save_at=[]),
        ]
    results = run_cases(cases, 2, tmp_path)
    for whole, _, resumed in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert resumed["first_step"] == STOP
        assert resumed["loss"] == whole["loss"][STOP:]
        assert resumed["norm"] == whole["norm"][STOP:]
        assert resumed["weights"] == whole["weights"]
        assert resumed["ema"] == whole["ema"]


@pytest.mark.multiproc
@pytest.mark.parametrize("world_size", [1, 4])
def test_resume_in_another_world_and_stage_goes_on_as_if_nothing_happened(world_size: int, tmp_path: Path) -> None:
    """Written by two ranks; read by one and by four, in the same and in another ZeRO stage. No conversion step."""
    pairs = [(stage, optimizer) for stage in STAGES for optimizer in OPTIMIZERS]
    first = [
        case(stage, optimizer, run=str(tmp_path / f"{stage}{optimizer}"), steps=STOP, save_at=[STOP])
        for stage, optimizer in pairs
    ]
    run_cases(first, 2, tmp_path)
    second: list[dict[str, Any]] = []
    for stage, optimizer in pairs:
        # One process keeps each stage; four processes change it.
        new_stage = stage if world_size == 1 else (stage + 1) % 4
        second.append(case(new_stage, optimizer, run=str(tmp_path / f"{stage}{optimizer}"), save_at=[]))
    for resumed, spec in zip(run_cases(second, world_size, tmp_path), second, strict=True):
        assert resumed["first_step"] == STOP
        want = reference(spec["optimizer"])
        np.testing.assert_allclose(resumed["loss"], want["loss"][STOP:END], rtol=1e-5, err_msg=spec["run"])


@pytest.mark.multiproc
@pytest.mark.faults
def test_all_ranks_resume_from_the_one_that_rank_0_chose_however_old_their_listing_is(tmp_path: Path) -> None:
    worker = "tests.multiproc.train_worker"
    run_ranks(worker, [str(tmp_path), "2"], 2)
    run_ranks(worker, [str(tmp_path), "3", '{"limit_s": 20, "stale": [1, 3]}'], 2)
    assert list(read_losses(tmp_path)) == [0, 1, 2]
    # One that never sees it ends all ranks, long before they would stop to wait for it.
    ranks = start_ranks(worker, [str(tmp_path), "4", '{"limit_s": 20, "stale": [1, 1000000]}'], 2)
    (code, seeing), (blind_code, blind) = wait_ranks(ranks, limit_s=240)
    assert (code, blind_code) == (1, 1)
    assert "1 of 2 ranks do not see this checkpoint" in seeing
    assert "this host did not see it within 10 s" in blind
    assert "is not here yet" in blind
    assert list(read_losses(tmp_path)) == [0, 1, 2]


@pytest.mark.multiproc
@pytest.mark.faults
def test_a_rank_that_cannot_write_stops_all_ranks_and_says_so(tmp_path: Path) -> None:
    """Long before `step_limit_s`: rank 0 does not wait for a file that will not come."""
    ranks = start_ranks("tests.multiproc.train_worker", [str(tmp_path), "5", '{"full_disk": 1, "limit_s": 500}'], 2)
    (code, waiting), (full_code, full) = wait_ranks(ranks, limit_s=240)
    assert (code, full_code) == (1, 1)
    assert "No space left on device" in full
    assert "another rank could not write its part" in waiting
    assert list_checkpoints(tmp_path) == []
