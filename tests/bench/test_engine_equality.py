"""20 steps of Hermes-R and Hermes-M: all ZeRO stages, 1, 2, 4 ranks, LAMB and AdamW, against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiproc.hermes_cases import deviations, drift


@pytest.mark.bench
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", ["hermes-r", "hermes-m"])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_curve_of_20_steps(
    model: str, optimizer: str, world: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = deviations(model, optimizer, [0, 1, 2, 3], world=world, steps=20, folder=tmp_path)
    with capsys.disabled():
        cells = " | ".join(f"{loss:.1e}, {change:.1e}" for loss, change in found)
        print(f"\n| {model} | {optimizer} | {world} | {cells} |")
    assert all(loss < 1e-5 for loss, _ in found)
    assert all(change < 3e-2 for _, change in found)


@pytest.mark.bench
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["hermes-r", "hermes-m"])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_one_process_in_micro_batches_against_itself(model: str, optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What rounding alone does at the rates of this bench: an engine that is right can be no nearer."""
    found = drift(model, optimizer, steps=20)
    with capsys.disabled():
        print(f"\n{model}, {optimizer}, plain PyTorch, no engine: {found:.1e}")
    assert found < 1e-4
