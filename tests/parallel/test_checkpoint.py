"""Checkpoints of a world of one: complete or invisible, damage, pruning, other models, weights for export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hermes_dist.config import CheckpointConfig
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel import checkpoint
from hermes_dist.parallel.checkpoint import Checkpointer, list_checkpoints, mark_best
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.fragments import write_tensors
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.parallel.snapshot import adam_step
from hermes_dist.parallel.weights import read_weights
from tests.parallel.conftest import make_config, make_engine, train_steps

CONFIG = CheckpointConfig(keep=2)


def save_some(run: Path, runtime: Runtime, steps: int = 3) -> Engine:
    engine = make_engine(runtime)
    checkpointer = Checkpointer(run, CONFIG, runtime)
    for step in range(steps):
        train_steps(engine, step, step + 1)
        checkpointer.save(engine, {"step": step + 1}, step + 1)
    checkpointer.finish()
    return engine


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_save_prune_load_bitwise(tmp_path: Path, runtime: Runtime) -> None:
    engine = save_some(tmp_path, runtime)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3, 2]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    want = train_steps(engine, 3, 5)
    again = make_engine(runtime)
    state = Checkpointer(tmp_path, CONFIG, runtime).load(again)
    assert state == {"step": 3}
    assert again.steps == 3
    assert train_steps(again, 3, 5) == want


def test_snapshot_is_not_touched_by_the_next_steps(tmp_path: Path, runtime: Runtime) -> None:
    engine = make_engine(runtime)
    train_steps(engine, 0, 2)
    want = engine.gather_weights(averaged=False)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    checkpointer.save(engine, {}, 2)
    train_steps(engine, 2, 6)
    checkpointer.finish()
    got = read_weights(tmp_path, ema=False)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_random_generators_come_back(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime, steps=1)
    want = torch.rand(3)
    torch.manual_seed(12345)
    Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime))
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("position", [3, 100, -1])
def test_a_damaged_one_falls_back_to_the_previous_and_says_so(
    tmp_path: Path, runtime: Runtime, position: int, capsys: pytest.CaptureFixture[str]
) -> None:
    save_some(tmp_path, runtime)
    flip_byte(tmp_path / "checkpoints" / "step_00000003" / "rank_00000.safetensors", position)
    assert Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime)) == {"step": 2}
    assert "step_00000003/rank_00000.safetensors is damaged" in capsys.readouterr().err
    assert read_weights(tmp_path)


def test_an_unreadable_index_falls_back_too(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    save_some(tmp_path, runtime)
    (tmp_path / "checkpoints" / "step_00000003" / "checkpoint.json").write_text('{"format": 1, "st')
    assert Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime)) == {"step": 2}
    assert "no readable checkpoint" in capsys.readouterr().err


def test_all_damaged_is_an_error_not_a_silent_new_start(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime, steps=1)
    flip_byte(tmp_path / "checkpoints" / "step_00000001" / "rank_00000.safetensors", 50)
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is undamaged"):
        Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime))
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        read_weights(tmp_path)


def damage_index(run: Path, how: str) -> None:
    for index in (run / "checkpoints").glob("step_*/checkpoint.json"):
        if how == "cut off":
            index.write_text('{"format": 1, "st')
        elif how == "another version":
            index.write_text(json.dumps({**json.loads(index.read_text()), "format": 2}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "the index of none of 2 checkpoints is undamaged .*another run.name"),
        ("another version", "step_00000003 has checkpoint format 2; this version reads format 1"),
        ("stale", "checkpoint.json could not be read .*Stale file handle.*Mend the storage"),
    ],
)
def test_what_cannot_be_read_is_never_taken_for_nothing(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    """Starting anew would replace the old checkpoints one by one."""
    save_some(tmp_path, runtime)
    damage_index(tmp_path, how)
    if how == "stale":
        read = Path.read_bytes

        def stale(path: Path) -> bytes:
            if path.name == "checkpoint.json" and path.parent.name == "step_00000003":
                raise OSError(116, "Stale file handle")
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime))


@pytest.mark.parametrize("how", ["cut off", "another version"])
def test_one_that_cannot_be_opened_is_not_replaced(tmp_path: Path, runtime: Runtime, how: str) -> None:
    save_some(tmp_path, runtime, steps=1)
    damage_index(tmp_path, how)
    save_some(tmp_path, runtime, steps=1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert (tmp_path / "checkpoints" / "abandoned-step_00000001" / "rank_00000.safetensors").is_file()


def test_what_is_learned_of_a_loaded_step_is_noted_in_its_checkpoint(tmp_path: Path, runtime: Runtime) -> None:
    """An evaluation that was still due. The tensors are not written again: the checkpoint would be out of sight meanwhile."""
    save_some(tmp_path, runtime)
    written = tmp_path / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    before = written.stat()
    engine = make_engine(runtime)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    assert checkpointer.load(engine) == {"step": 3}
    checkpointer.amend(engine, {"step": 3, "evaluated": True}, 3, best=True)
    checkpointer.finish()
    assert written.stat().st_ino == before.st_ino
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000003\n"
    assert Checkpointer(tmp_path, CONFIG, runtime).load(engine) == {"step": 3, "evaluated": True}


def test_the_step_count_of_adamw_comes_back_as_torch_keeps_it(tmp_path: Path, runtime: Runtime) -> None:
    """Where the buffer is: the fused kernel takes no other. (A device that is not there stands for a GPU.)"""
    engine = make_engine(runtime, optimizer={"name": "adamw"})
    train_steps(engine, 0, 2)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    checkpointer.save(engine, {}, 2)
    checkpointer.finish()
    again = make_engine(runtime, optimizer={"name": "adamw"})
    checkpointer.load(again)
    for ours, theirs in zip(again.partition.buffers, engine.partition.buffers, strict=True):
        want, got = engine.optimizer.state[theirs.key]["step"], again.optimizer.state[ours.key]["step"]
        assert (got.dtype, got.device, float(got)) == (want.dtype, want.device, float(want))
    assert adam_step(2, torch.empty(1, device="meta")).device.type == "meta"


def test_a_failed_write_gives_its_space_back_at_once(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next checkpoint: until then nothing else could be written either."""

    def half(path: Path, tensors: object) -> dict[str, int]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hermes_dist.parallel.checkpoint.write_tensors", half)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    checkpointer.save(make_engine(runtime), {}, 1)
    assert checkpointer._thread is not None
    checkpointer._thread.join(60)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_one_is_replaced_when_its_step_is_reached_again(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime)
    file = tmp_path / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    flip_byte(file, 100)
    engine = make_engine(runtime)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    checkpointer.load(engine)
    train_steps(engine, 2, 3)
    checkpointer.save(engine, {"step": 3}, 3)
    checkpointer.finish()
    assert not list_checkpoints(tmp_path)[0].damaged_files()
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_leftovers_of_a_killed_writer_are_invisible_and_removed(tmp_path: Path, runtime: Runtime) -> None:
    leftover = tmp_path / "checkpoints" / ".tmp-step_00000009-0123456789"
    leftover.mkdir(parents=True)
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    assert Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime)) is None
    save_some(tmp_path, runtime, steps=1)
    assert not leftover.exists()


def test_resume_never_and_by_path(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)
    assert checkpointer.load(make_engine(runtime), "never") is None
    assert checkpointer.load(make_engine(runtime), str(tmp_path / "checkpoints" / "step_00000002")) == {"step": 2}
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        checkpointer.load(make_engine(runtime), str(tmp_path / "nowhere"))


def test_another_model_is_named(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime, steps=1)
    other = Engine(nn.Linear(3, 2), make_config(), runtime)
    with pytest.raises(CheckpointError, match="of another model: parameter 'bias' is absent there and \\[2\\] here"):
        Checkpointer(tmp_path, CONFIG, runtime).load(other)


def test_another_optimizer_is_named(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime, steps=1)
    with pytest.raises(CheckpointError, match="written with optimizer 'lamb', and this is 'adamw'"):
        Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime, optimizer={"name": "adamw"}))


def test_another_format_version_is_named(tmp_path: Path, runtime: Runtime) -> None:
    save_some(tmp_path, runtime, steps=1)
    index = tmp_path / "checkpoints" / "step_00000001" / "checkpoint.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime), str(index.parent))


def test_the_best_one_and_one_per_hours_are_kept(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(runtime)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_every_hours=1.0), runtime)
    for step in range(6):
        monkeypatch.setattr("time.time", lambda step=step: 1000.0 + step * 1800)
        checkpointer.save(engine, {}, step)
        checkpointer.finish()
        if step == 1:
            mark_best(tmp_path, 1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5, 4, 2, 1, 0]


def test_the_best_so_far_is_kept_until_a_better_one_is_complete(tmp_path: Path, runtime: Runtime) -> None:
    engine = make_engine(runtime)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1), runtime)
    for step, best in enumerate([True, False, True, False, False]):
        checkpointer.save(engine, {}, step, best=best)
    checkpointer.finish()
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 2]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000002\n"


def test_settings_that_changed_are_named_at_resume(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    save_some(tmp_path, runtime, steps=1)
    again = make_engine(runtime, stage=2, optimizer={"clip_norm": 0.5}, monitor={"log_every": 3})
    Checkpointer(tmp_path, CONFIG, runtime).load(again)
    said = "settings changed since step_00000001: deepspeed.zero_optimization.stage: 1 → 2; optimizer.clip_norm: 1.0 → 0.5"
    assert said in capsys.readouterr().err.replace("\n", "")
    Checkpointer(tmp_path, CONFIG, runtime).load(make_engine(runtime))
    assert "settings changed" not in capsys.readouterr().err


def test_weights_are_those_of_the_state_dict_averaged_by_default(tmp_path: Path, runtime: Runtime) -> None:
    engine = save_some(tmp_path, runtime)
    averaged = read_weights(tmp_path)
    assert averaged.keys() == engine.module.state_dict().keys()
    want = engine.averaged_weights()
    assert all(torch.equal(averaged[n], want[n]) for n in want)
    plain = read_weights(tmp_path / "checkpoints" / "step_00000003", ema=False)
    assert all(torch.equal(plain[n], v) for n, v in engine.module.state_dict().items())
    assert not torch.equal(plain["mix.weight"], averaged["mix.weight"])


def test_exported_weights_are_read_where_no_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        read_weights(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert torch.equal(read_weights(tmp_path)["w"], torch.ones(2))


def test_a_write_that_fails_is_reported_and_harms_nothing(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = save_some(tmp_path, runtime, steps=1)
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hermes_dist.parallel.checkpoint.write_tensors", full)
    checkpointer.save(engine, {}, 2)
    with pytest.raises(CheckpointError, match="could not be written: .*No space left"):
        checkpointer.finish()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("background", [True, False])
def test_one_write_that_fails_does_not_prevent_the_next_two_in_a_row_end_the_run(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine(runtime)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(background=background), runtime)
    fails: list[bool] = []

    def sometimes_full(*args: Any) -> dict[str, int]:
        if fails.pop(0):
            raise OSError(28, "No space left on device")
        return write_tensors(*args)

    monkeypatch.setattr("hermes_dist.parallel.checkpoint.write_tensors", sometimes_full)
    fails += [True, False, True, True]
    checkpointer.save(engine, {}, 1)
    checkpointer.save(engine, {}, 2)  # as the one before a pre-emption
    checkpointer.finish()
    assert [c.step for c in list_checkpoints(tmp_path)] == [2]
    assert "warning: " in (said := capsys.readouterr().err)
    assert "rank 0: OSError: [Errno 28] No space left on device. The run goes on" in said
    checkpointer.save(engine, {}, 3)
    with pytest.raises(CheckpointError, match="No space left"):  # the last one may not fail
        checkpointer.finish()

    def save_two() -> None:
        checkpointer.save(engine, {}, 4)
        checkpointer.save(engine, {}, 5)

    with pytest.raises(CheckpointError, match="No space left"):
        save_two()
    assert [c.step for c in list_checkpoints(tmp_path)] == [2]


def test_any_error_of_the_writer_is_reported(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, CONFIG, runtime)

    def broken(*_: object) -> None:
        raise RuntimeError("not foreseen")

    monkeypatch.setattr("hermes_dist.parallel.checkpoint.write_tensors", broken)
    checkpointer.save(make_engine(runtime), {}, 1)
    with pytest.raises(CheckpointError, match="RuntimeError: not foreseen"):
        checkpointer.finish()


def test_an_old_one_that_cannot_be_deleted_does_not_fail_the_new_one(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system while somebody reads it."""

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        save_some(tmp_path, runtime)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3, 2]
    save_some(tmp_path, runtime, steps=1)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_writing_makes_room_for_steps_unless_none_follow(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(checkpoint.os, "setpriority", lambda which, who, niceness: asked.append(niceness))
    checkpointer, engine = Checkpointer(tmp_path, CONFIG, runtime), make_engine(runtime)
    checkpointer.save(engine, {}, 1)
    checkpointer.finish()
    assert asked == [checkpoint.WRITER_NICENESS]
    checkpointer.save(engine, {}, 2, urgent=True)
    checkpointer.finish()
    assert asked == [checkpoint.WRITER_NICENESS]
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 1]
