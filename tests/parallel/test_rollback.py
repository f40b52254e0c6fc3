"""Going back to an older checkpoint of the same run: what came after it is abandoned, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hermes_dist.config import CheckpointConfig
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.checkpoint import Checkpointer, list_checkpoints
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import Runtime
from tests.parallel.conftest import make_engine


class Run:
    """A run whose processes come and go."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime, self.root = folder, runtime, folder / "checkpoints"
        self.engine: Engine = make_engine(runtime)

    def go(self, resume: str | int, *steps: int, keep: int = 2, best: int | None = None) -> int:
        """Start a process, which saves at `steps`; returns the step it resumed from."""
        checkpointer = Checkpointer(self.folder, CheckpointConfig(keep=keep), self.runtime)
        where = resume if isinstance(resume, str) else str(self.root / f"step_{resume:08d}")
        state = checkpointer.load(self.engine, where)
        for step in steps:
            checkpointer.save(self.engine, {"step": step}, step, best=step == best)
        checkpointer.finish()
        return state["step"] if state else 0

    @property
    def steps(self) -> list[int]:
        return [c.step for c in list_checkpoints(self.folder)]


@pytest.fixture
def run(tmp_path: Path, runtime: Runtime) -> Run:
    return Run(tmp_path, runtime)


def test_what_came_after_is_abandoned_and_auto_follows_the_new_branch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.go("auto", 2000, 3000, best=3000)
    assert run.go(2000) == 2000
    assert "goes back to step_00002000; newer checkpoints were renamed: step_00003000" in capsys.readouterr().err
    assert run.steps == [2000]
    assert (run.root / "abandoned-step_00003000" / "checkpoint.json").is_file()
    assert (run.root / "latest").read_text() == "step_00002000\n"
    assert not (run.root / "best").exists()
    assert run.go("auto", 2500) == 2000
    assert run.go("auto", 3000) == 2500
    assert run.go("auto") == 3000
    assert run.steps == [3000, 2500]


def test_the_one_just_committed_is_never_pruned(run: Run) -> None:
    run.go("auto", 1000, 2000, 3000, keep=3)
    run.go(1000, 1500, keep=2)
    assert run.steps == [1500, 1000]
    assert run.go("auto") == 1500
    other = Checkpointer(run.folder, CheckpointConfig(keep=1), run.runtime)  # somebody saves without having gone back
    other.save(run.engine, {"step": 500}, 500)
    other.finish()
    assert 500 in run.steps


def test_the_same_command_again_goes_on_with_the_newest_since(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.go("auto", 1000, 2000, 3000, keep=3)
    assert run.go(1000) == 1000
    assert run.go(1000, 1500) == 1000
    capsys.readouterr()
    assert run.go(1000, 2000) == 1500
    assert "goes on from step_00001500, written since the run went back to step_00001000" in capsys.readouterr().err
    assert run.go(1000, 2500) == 2000  # though step 1000 is pruned by now
    assert run.steps == [2500, 2000]
    assert run.go(2000, 2400) == 2000  # another one: a new decision
    assert run.steps == [2400, 2000]
    assert run.go(2000) == 2400
    assert run.go("auto") == 2400
    assert run.go(2000) == 2000  # somebody went on with auto meanwhile, so this is one more decision
    assert sorted(p.name for p in run.root.glob("abandoned-*")) == [
        "abandoned-step_00002000", "abandoned-step_00002400", "abandoned-step_00002500", "abandoned-step_00003000",
    ]  # fmt: skip


def test_going_back_twice_over_the_same_step_keeps_both(run: Run) -> None:
    run.go("auto", 1, 2)
    for _ in range(2):
        run.go(1)
        run.go("auto", 2)
    run.go(1)
    assert sorted(p.name for p in run.root.glob("abandoned-*")) == [
        "abandoned-step_00000002", "abandoned-step_00000002-2", "abandoned-step_00000002-3",
    ]  # fmt: skip


def test_a_damaged_one_abandons_nothing(run: Run) -> None:
    run.go("auto", 1, 2)
    (run.root / "step_00000001" / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="undamaged"):
        run.go(1)
    assert run.steps == [2, 1]


def test_an_abandoned_one_says_how_to_return_to_it(run: Run) -> None:
    run.go("auto", 1, 2)
    run.go(1)
    with pytest.raises(CheckpointError, match="rename it to 'step_00000002'"):
        run.go(str(run.root / "abandoned-step_00000002"))


def test_a_checkpoint_of_another_run_abandons_nothing(run: Run, tmp_path: Path, runtime: Runtime) -> None:
    run.go("auto", 1, 2)
    other = Run(tmp_path / "other", runtime)
    assert other.go(str(run.root / "step_00000001"), 3) == 1
    assert run.steps == [2, 1]
    assert not (run.root / "rolled_back").exists()


def test_a_run_that_began_at_another_keeps_its_own_progress(
    run: Run, tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again, as a requeue gives it."""
    run.go("auto", 10)
    start, other = str(run.root / "step_00000010"), Run(tmp_path / "other", runtime)
    assert other.go(start, 40) == 10
    capsys.readouterr()
    assert other.go(start, 50) == 40
    assert f"goes on from step_00000040, written since the run began at {start}" in capsys.readouterr().err
    run.go("auto", 20, 30, 40)  # the named one is pruned there
    assert other.go(start, keep=1) == 50
    assert other.go("auto", 60) == 50
    assert other.steps == [60, 50]


def test_a_run_with_checkpoints_of_its_own_that_begins_at_another_abandons_them(
    run: Run, tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no descendants of it: their step numbers would be taken for newer."""
    run.go("auto", 10)
    other = Run(tmp_path / "other", runtime)
    other.go("auto", 5, 90, best=90)
    assert other.go(str(run.root / "step_00000010"), 20) == 10
    said = capsys.readouterr().err
    assert "the run's own checkpoints were renamed: step_00000005, step_00000090 → abandoned-step_…" in said
    assert other.steps == [20]
    assert not (other.root / "best").exists()
    assert other.go("auto") == 20
