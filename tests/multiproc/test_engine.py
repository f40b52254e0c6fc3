"""Every ZeRO stage, world size and accumulation computes what one process computes with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multiproc.cases import BASE, assert_equal_to_reference, reference, run_cases


@pytest.mark.multiproc
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 1), (4, 1)])
def test_loss_curve_equals_one_process_with_the_whole_batch(world_size: int, micro_batch: int, tmp_path: Path) -> None:
    """Three micro-batches on one rank, three on each of two, two on each of four (of which the last rank's are filler)."""
    cases = [
        {**BASE, "stage": stage, "optimizer": optimizer, "micro_batch": micro_batch}
        for stage in (0, 1, 2, 3)
        for optimizer in ("lamb", "adamw")
    ]
    for case, got in zip(cases, run_cases(cases, world_size, tmp_path), strict=True):
        assert_equal_to_reference(got, case["optimizer"], f"{world_size} ranks, {case}")
        assert not any(got["skipped"])


@pytest.mark.multiproc
@pytest.mark.parametrize("world_size", [2, 4])
def test_trust_ratios_are_those_of_whole_tensors(world_size: int, tmp_path: Path) -> None:
    """Odd sizes, tensors smaller than the world, tensors that straddle ranks."""
    cases = [{**BASE, "steps": 3, "stage": stage, "optimizer": "lamb", "micro_batch": 3} for stage in (0, 1, 2, 3)]
    for case, got in zip(cases, run_cases(cases, world_size, tmp_path), strict=True):
        np.testing.assert_allclose(got["ratios"], reference("lamb")["ratios"][:3], rtol=1e-5, err_msg=str(case))


@pytest.mark.multiproc
def test_options_that_must_not_change_the_result(tmp_path: Path) -> None:
    """Sub-groups and partitioned small parameters in stage 3, round robin in stage 2, optimizer states in host memory."""
    options: list[tuple[int, str, dict[str, Any]]] = [
        (3, "lamb", {"sub_group_size": 60}),
        (3, "adamw", {"stage3_param_persistence_threshold": 0}),
        (3, "lamb", {"offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}),
        (2, "lamb", {"round_robin_gradients": True}),
        (2, "adamw", {"offload_optimizer": {"device": "cpu"}}),
        (1, "lamb", {"offload_optimizer": {"device": "cpu"}}),
        (2, "lamb", {"overlap_comm": True, "reduce_bucket_size": 50}),
        (1, "adamw", {"contiguous_gradients": False}),
    ]
    cases = [{**BASE, "stage": stage, "optimizer": name, "micro_batch": 1, "zero": zero} for stage, name, zero in options]
    for case, got in zip(cases, run_cases(cases, 2, tmp_path), strict=True):
        assert_equal_to_reference(got, case["optimizer"], str(case))


@pytest.mark.multiproc
def test_bf16_with_accumulation_has_the_ratios_of_one_process(tmp_path: Path) -> None:
    """fp32 masters and gradients: from the same weights every stage takes the same step, whoever computes it."""
    cases = [
        {**BASE, "steps": 1, "stage": stage, "optimizer": "lamb", "micro_batch": 1, "precision": "bf16"} for stage in (0, 1, 2, 3)
    ]
    (alone,) = run_cases(cases[:1], 1, tmp_path)
    assert alone["norm"][0] != pytest.approx(reference("lamb")["norm"][0], rel=1e-5), "this was computed in fp32"
    for case, got in zip(cases, run_cases(cases, 2, tmp_path), strict=True):
        np.testing.assert_allclose(got["loss"], alone["loss"], rtol=1e-6, err_msg=str(case))
        np.testing.assert_allclose(got["ratios"], alone["ratios"], rtol=1e-5, err_msg=str(case))
        for a, b in zip(got["weights"], alone["weights"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(case))
