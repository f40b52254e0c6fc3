"""Hermes-R and Hermes-M under the engine: mixed tasks per sample, a frozen stem, an unused head. The whole grid: tests/bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiproc.hermes_cases import deviations


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(("model", "optimizer", "stage", "world"), [("hermes-r", "lamb", 3, 2), ("hermes-m", "adamw", 2, 4)])
def test_losses_and_weights_equal_those_of_one_process(
    model: str, optimizer: str, stage: int, world: int, tmp_path: Path
) -> None:
    ((loss, change),) = deviations(model, optimizer, [stage], world=world, steps=3, folder=tmp_path)
    assert loss < 1e-5
    assert change < 3e-2  # a step moves a weight by few units in its last place
