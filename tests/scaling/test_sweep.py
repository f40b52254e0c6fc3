"""Sweeps: the grid, resuming, early stop, results; with a fake training that writes what a real one writes."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hermes_dist.config import load_config
from hermes_dist.errors import ConfigError, UsageError
from hermes_dist.scaling import sweep_runner
from hermes_dist.scaling.member_resources import member_environment, threads_per_rank, visible_gpus
from hermes_dist.scaling.sweep import Member, StopConfig, SweepConfig, members, read_sweep, split_override
from hermes_dist.scaling.sweep_identity import check_unchanged
from hermes_dist.scaling.sweep_results import State, read_state, result_row, write_state
from hermes_dist.scaling.sweep_runner import Runner, divergence
from hermes_dist.train.environment import describe_environment
from hermes_dist.train.run_directory import prepare
from tests.train.tiny_run import make_store

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FAKE_TRAIN = '''
"""Writes rows like a training; fails once if asked to, or diverges."""
import json, os, sys, time
from pathlib import Path
pairs = dict(a.partition("=")[::2] for a in sys.argv[1:] if "=" in a)
run = Path(pairs["run.output_dir"]) / pairs["run.name"]
run.mkdir(parents=True, exist_ok=True)
if pairs["run.seed"] == "13" and not (run / "tried").exists():
    (run / "tried").touch()
    sys.exit(3)
if pairs["run.seed"] == "15" and not (run / "pid").exists():
    (run / "pid").write_text(str(os.getpid()))
    time.sleep(60)
with (run / "metrics.jsonl").open("w") as file:
    for step in range(int(pairs["train.max_steps"])):
        loss = 1.0 + step if pairs["run.seed"] == "14" else 1 / (1 + step)
        row = {"step": step, "loss": loss, "step_s": 0.1, "data_wait_s": 0.01, "data_stall_s": 0.02, "samples_per_s": 20.0}
        print(json.dumps(row), file=file)
'''

FAKE_EVALUATE = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run") + 1]) / "evaluation"
folder.mkdir(exist_ok=True)
if "--loss" in sys.argv:
    asked = int(sys.argv[sys.argv.index("--loss") + 1])
    (folder / "val_loss.json").write_text(json.dumps({"loss": 2 / asked, "requested": asked, "samples": asked}))
else:
    scores = [{"dataset": "a", "dice": 0.75}, {"dataset": "b", "dice": None}]
    (folder / "val.json").write_text(json.dumps({"per_dataset": scores}))
"""


def sweep_of(folder: Path, **changes: Any) -> SweepConfig:
    grid = {"model.base_channels": [8, 16], "run.seed": [0]}
    data = {
        "name": "s",
        "base": "demo.json",
        "output_dir": str(folder),
        "grid": grid,
        "overrides": {"train.max_steps": 50, "train.global_batch": 4},
        **changes,
    }
    return SweepConfig.model_validate(data)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweep_runner, "POLL_S", 0.05)
    path = tmp_path / "train.py"
    path.write_text(FAKE_TRAIN)
    return path


def run(sweep: SweepConfig, train: Path) -> tuple[list[Member], dict[str, State]]:
    chosen = members(sweep, CONFIGS)
    return chosen, Runner(sweep, chosen, train, lambda _: None).run()


def test_members_are_the_grid_times_the_points(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, points=[{"ranks": 1, "train.global_batch": 2}, {"ranks": 2, "train.global_batch": 4}])
    chosen = members(sweep, CONFIGS)
    assert [m.name for m in chosen] == [
        f"base_channels{c}-seed0-global_batch{2 * r}{'-r2' * (r == 2)}" for c in (8, 16) for r in (1, 2)
    ]
    config = chosen[1].config()
    assert (config.model.base_channels, config.train.global_batch, config.train.max_steps) == (8, 4, 50)
    assert "--nproc-per-node=2" in chosen[1].command(Path("train.py"))
    assert config.run_dir == chosen[1].run_dir


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"model.base_chanels": [8]}}, "base_chan"),
        ({"grid": {"model.base_channels": [8, 8]}}, "occurs twice"),
        ({"base": "nowhere.json"}, "nowhere"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members(sweep_of(tmp_path, **changes), CONFIGS)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("run.seed", r"grid\['run.seed'\]"),
        ("train.global_batch", "in `points`"),
        ("train", "'train.global_batch'"),
        ("run.name", "`name`"),
        ("run.output_dir", "`output_dir`"),
        ("run.resume", "always resume"),
        ("ranks", "in `points`"),
    ],
)
def test_an_override_without_effect_is_refused(tmp_path: Path, key: str, instead: str) -> None:
    sweep = sweep_of(tmp_path, points=[{"ranks": 1, "train.global_batch": 2}, {"ranks": 2}])
    with pytest.raises(ConfigError, match=f"override '{key}'.*{instead}"):
        split_override(sweep, f"{key}=1")
    with pytest.raises(ConfigError, match="expected section"):
        split_override(sweep, "run.device")
    for free in ("run.device", "train.global", "train.max_steps"):
        assert split_override(sweep, f"{free}=a=b") == (free, "a=b")


@pytest.mark.parametrize("name", ["scaling.json", "throughput.json", "dice_by_size.json"])
def test_the_committed_sweeps_are_valid(name: str) -> None:
    sweep = read_sweep(CONFIGS / "sweeps" / name)
    assert len(members(sweep, CONFIGS)) >= 10


def test_finished_runs_are_kept_and_dead_ones_tried_again(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"run.seed": [0, 13]}, at_once=2)
    chosen, states = run(sweep, train)
    assert {name: (s.state, s.tries) for name, s in states.items()} == {"seed0": ("done", 1), "seed13": ("done", 2)}
    before = (chosen[0].run_dir / "metrics.jsonl").stat().st_mtime_ns
    run(sweep, train)
    assert (chosen[0].run_dir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_out_of_tries_has_failed_and_the_next_call_tries_again(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"run.seed": [13]}, retries=0)
    chosen, states = run(sweep, train)
    assert states["seed13"].state == "failed"
    assert "exit code 3" in states["seed13"].reason
    assert run(sweep, train)[1]["seed13"].state == "done"
    assert read_state(chosen[0]).state == "done"


def test_a_killed_sweep_takes_its_running_members_up_again(tmp_path: Path) -> None:
    member = members(sweep_of(tmp_path), CONFIGS)[0]
    write_state(member, State("running", 1))
    assert read_state(member).state == "waiting"


def test_a_diverging_run_is_stopped_and_kept_as_such(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"run.seed": [14]}, stop={"window": 5})
    assert run(sweep, train)[1]["seed14"].state == "diverged"


def test_divergence_is_a_rise_or_nan_and_nothing_else() -> None:
    stop = StopConfig(factor=2, window=3)
    assert divergence([1.0] * 3 + [2.5] * 3, stop)
    assert divergence([1.0] * 3 + [None] * 3, stop)
    assert not divergence([1.0] * 3 + [None, 0.9, 0.9], stop)
    assert not divergence([1.0] * 3 + [9.0], stop)
    assert divergence([9.0] * 3 + [1.0] * 3 + [2.5] * 3, stop), "against the best window, not the first"
    assert divergence([None] * 3, stop), "NaN is found after one window"


def stored(member: Member, *changes: str) -> None:
    """As if the member's run had been started with these changes."""
    member.run_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(member.base, [*member.arguments[2:], *changes])
    (member.run_dir / "config.json").write_text(config.model_dump_json())


def test_a_changed_configuration_does_not_take_the_old_results(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"run.seed": [0]})
    member = run(sweep, train)[0][0]
    stored(member, "monitor.log_every=3", "run.resume=never")
    assert run(sweep, train)[1]["seed0"].state == "done", "what does not matter may differ"
    changed = sweep_of(tmp_path, grid={"run.seed": [0]}, overrides={"train.max_steps": 60, "train.global_batch": 4})
    with pytest.raises(ConfigError, match=r"seed0 was run with train\.max_steps = 50 and the sweep now says 60.*delete"):
        run(changed, train)
    row = result_row(members(changed, CONFIGS)[0], State("done"), changed)
    assert row["data_wait_s"] == 0.02, "the longest of the ranks"
    assert row["samples"] == 200, "a row is about the run that there is"


def test_results_of_other_data_behind_the_same_path_are_refused(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store")
    given = {"train.max_steps": 50, "train.global_batch": 4, "data.stores": [str(tmp_path / "store")]}
    sweep = sweep_of(tmp_path, grid={"run.seed": [0]}, overrides=given)
    member = run(sweep, train)[0][0]
    stored(member)
    check_unchanged([member])
    assert "note: " in capsys.readouterr().err, "a run without a record passes"
    now, collection = store.collection.digest, store.collection
    prepare(member.config(), collection.tasks, collection.preprocessing, 1, now)
    check_unchanged([member])
    assert not capsys.readouterr().err
    prepare(member.config(), collection.tasks, collection.preprocessing, 1, "newer")
    with pytest.raises(ConfigError, match=f"content {now}, then newer, which is now {now}.*delete"):
        run(sweep, train)
    (member.run_dir / "stores.json").write_text('{"digests": ["older"]}')
    with pytest.raises(ConfigError, match=f"content older, which is now {now}"):
        run(sweep, train)
    (tmp_path / "store").rename(tmp_path / "moved")
    check_unchanged([member])
    assert "is not known" in capsys.readouterr().err


def test_a_held_out_loss_over_other_patches_is_measured_again(tmp_path: Path, train: Path) -> None:
    train.with_name("evaluate.py").write_text(FAKE_EVALUATE)
    sweeps = [sweep_of(tmp_path, grid={"run.seed": [0]}, held_out={"samples": n}) for n in (8, 16)]
    member = run(sweeps[0], train)[0][0]
    assert result_row(member, State("done"), sweeps[0])["loss"] == 0.25
    assert result_row(member, State("done"), sweeps[1])["loss"] is None
    run(sweeps[1], train)
    assert result_row(member, State("done"), sweeps[1])["loss"] == 0.125
    older = {"loss": 0.5, "samples": 16}  # states whole batches only: 13 to 16 were asked for, and all mean the same 16
    member.evaluation("val_loss").write_text(json.dumps(older))
    assert result_row(member, State("done"), sweeps[1])["loss"] == 0.5


def test_members_at_a_time_have_gpus_of_their_own_and_one_thread(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a faked number of devices: three members, two at a time, on three visible GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):  # an engine in this process sets the latter
        monkeypatch.delenv(name, raising=False)
    train.write_text(
        FAKE_TRAIN + "\nkeys = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')\n"
        "(run / 'given').write_text(' '.join(os.environ[key] for key in keys))\n"
        "import time\nfor _ in range(200):\n"
        "    if len(list(run.parent.glob('*/given'))) > 1: break\n    time.sleep(0.05)\n"
    )
    sweep = sweep_of(tmp_path, study="throughput", grid={"run.seed": [0, 1]}, at_once=2)
    chosen, states = run(sweep, train)
    assert {state.state for state in states.values()} == {"done"}
    assert [(m.run_dir / "given").read_text() for m in chosen] == ["4 1", "5 1"]
    wide = members(sweep_of(tmp_path, points=[{"ranks": 4}]), CONFIGS)
    with pytest.raises(UsageError, match="4 ranks, and 3 GPU"):
        Runner(sweep, wide, train, lambda _: None)


def test_gpus_and_threads_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 6"}) == ["3", "6"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"DS_ACCELERATOR": "cpu"}) == []
    scaling, throughput = sweep_of(tmp_path), sweep_of(tmp_path, study="throughput")
    assert threads_per_rank(scaling, 2, at_once=2, gpus=False) == 4
    assert threads_per_rank(scaling, 32, at_once=2, gpus=False) == 1
    assert threads_per_rank(scaling, 1, at_once=1, gpus=True) == 4
    assert threads_per_rank(throughput, 1, at_once=1, gpus=False) == 1
    assert member_environment([], 1, {"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}


def test_a_member_that_outlived_its_sweep_is_waited_for_and_not_run_twice(tmp_path: Path, train: Path) -> None:
    """As after kill -9 of the sweep: the child goes on, and holds the member's lock until it ends."""
    sweep = sweep_of(tmp_path, grid={"run.seed": [0]})
    member = members(sweep, CONFIGS)[0]
    member.run_dir.mkdir(parents=True)
    write_state(member, State("running", 1))
    with (member.run_dir / ".sweep.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    seen: list[State] = []

    def watch(states: dict[str, State]) -> None:
        seen.append(states["seed0"])
        if len(seen) == 2 and orphan.stdin:
            assert not member.metrics.exists()
            orphan.stdin.close()

    assert Runner(sweep, [member], train, watch).run()["seed0"].state == "done"
    orphan.wait(10)
    assert "still running" in seen[0].reason


def test_an_interrupted_sweep_stops_its_members_and_the_next_one_goes_on(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"run.seed": [15]})
    started: list[int] = []

    def interrupt(states: dict[str, State]) -> None:
        member = members(sweep, CONFIGS)[0]
        if (member.run_dir / "pid").exists():
            started.append(int((member.run_dir / "pid").read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(sweep, members(sweep, CONFIGS), train, interrupt).run()
    assert not psutil.pid_exists(started[0])
    assert run(sweep, train)[1]["seed15"].state == "done"


def test_results_that_the_sweep_wants_follow_the_training(tmp_path: Path, train: Path) -> None:
    """Also of members that had finished before the sweep asked for them."""
    run(sweep_of(tmp_path), train)
    train.with_name("evaluate.py").write_text(FAKE_EVALUATE)
    sweep = sweep_of(tmp_path, held_out={"split": "val", "samples": 8}, evaluate="val")
    chosen, states = run(sweep, train)
    assert {s.state for s in states.values()} == {"done"}
    row = result_row(chosen[0], states[chosen[0].name], sweep)
    assert (row["loss"], row["dice"]) == (0.25, 0.75)
    assert row["train_loss"] < 0.25
    commands = [line for line in (chosen[0].run_dir / "log.txt").read_text().splitlines() if line.startswith("$")]
    assert [Path(c.split()[2]).name for c in commands] == ["train.py", "evaluate.py", "evaluate.py"], "trained once"


def test_devices_are_cores_by_the_threads_that_a_rank_had(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    member = members(sweep, CONFIGS)[0]
    member.run_dir.mkdir(parents=True)
    path = member.run_dir / "environment.json"
    found = {"gpus": [], "cpu_count": 8, "omp_num_threads": None, "threads": 4}
    path.write_text(json.dumps(found))
    assert result_row(member, State(), sweep)["devices"] == 2
    assert describe_environment(1)["threads"] == torch.get_num_threads()


def test_a_result_row_reads_the_run_directory(tmp_path: Path, train: Path) -> None:
    sweep = sweep_of(tmp_path)
    chosen, states = run(sweep, train)
    row = result_row(chosen[0], states[chosen[0].name], sweep)
    assert row["steps"] == 50
    assert row["loss"] == pytest.approx(sum(1 / (1 + s) for s in range(45, 50)) / 5)
    assert row["samples"] == 4 * 50
    tasks = {
        "datasets": [
            {
                "name": "a",
                "modality": "CT",
                "region": "",
                "classes": [{"name": "l", "task_id": 0, "values": [1]}],
                "ignore_value": None,
            }
        ]
    }
    (chosen[0].run_dir / "tasks.json").write_text(json.dumps(tasks))
    assert result_row(chosen[0], states[chosen[0].name], sweep)["parameters"] > 1e6
