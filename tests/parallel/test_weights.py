"""Which checkpoint's weights are read: the newest, the best, or that of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hermes_dist.config import CheckpointConfig
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.checkpoint import Checkpointer
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.parallel.weights import open_weights, read_weights
from tests.parallel.conftest import make_engine, train_steps


def three(run: Path, runtime: Runtime, best: int | None = 2) -> list[dict[str, torch.Tensor]]:
    """Checkpoints of the steps 1, 2 and 3, and what they hold."""
    engine, held = make_engine(runtime), []
    checkpointer = Checkpointer(run, CheckpointConfig(keep=3), runtime)
    for step in (1, 2, 3):
        train_steps(engine, step - 1, step)
        held.append(engine.averaged_weights())
        checkpointer.save(engine, {}, step, best=step == best)
    checkpointer.finish()
    return held


@pytest.mark.parametrize(("asked", "step"), [("newest", 3), ("best", 2), ("1", 1), (1, 1), ("00000001", 1), ("step_00000003", 3)])
def test_the_chosen_checkpoint_is_read_and_named(tmp_path: Path, runtime: Runtime, asked: str | int, step: int) -> None:
    held = three(tmp_path, runtime)
    got = open_weights(tmp_path, asked)
    assert (got.checkpoint, got.chosen) == (f"step_{step:08d}", str(asked))
    assert str(got) == f"step_{step:08d} ({asked})"
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in held[step - 1].items())


@pytest.mark.parametrize("asked", ["7", "bets", "step_", "-1", ""])
def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path, runtime: Runtime, asked: str) -> None:
    three(tmp_path, runtime)
    with pytest.raises(CheckpointError) as error:
        open_weights(tmp_path, asked)
    said = f"{tmp_path}: no checkpoint {asked!r}; there are checkpoints of the steps 1, 2 (best), 3. Expected newest, best, or"
    assert str(error.value).startswith(said)


def test_best_needs_a_mark(tmp_path: Path, runtime: Runtime) -> None:
    three(tmp_path, runtime, best=None)
    with pytest.raises(CheckpointError, match=r"marked as the best; there are checkpoints of the steps 1, 2, 3; none is marked"):
        open_weights(tmp_path, "best")
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="none is marked"):
        open_weights(tmp_path, "best")


def test_a_run_without_checkpoints_has_its_exported_weights_only(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert str(open_weights(tmp_path)) == "weights.safetensors (newest)"
    with pytest.raises(CheckpointError, match="no checkpoint '3'; there are no complete checkpoints"):
        open_weights(tmp_path, 3)


def test_of_one_set_of_weights_nothing_is_chosen(tmp_path: Path, runtime: Runtime) -> None:
    three(tmp_path, runtime)
    one = tmp_path / "checkpoints" / "step_00000002"
    assert open_weights(one).checkpoint == "step_00000002"
    for source in (one, one / "rank_00000.safetensors"):
        with pytest.raises(CheckpointError, match="one set of weights, of which 'best' cannot be chosen"):
            open_weights(source, "best")


def test_only_the_newest_gives_way_to_an_older_one(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever names a checkpoint wants that one."""
    held = three(tmp_path, runtime, best=3)
    (tmp_path / "checkpoints" / "step_00000003" / "rank_00000.safetensors").write_bytes(b"torn")
    got = open_weights(tmp_path)
    assert str(got) == "step_00000002 (newest)"
    assert all(torch.equal(read_weights(tmp_path)[name], tensor) for name, tensor in held[1].items())
    assert "step_00000003/rank_00000.safetensors is damaged" in capsys.readouterr().err
    for asked in ("best", "3"):
        with pytest.raises(CheckpointError, match=f"damaged .*weights of '{asked}' cannot be read; choose another"):
            open_weights(tmp_path, asked)
