"""Sweeps: the grid, resuming, early stop, results, fits and reports; with a fake training that writes what a real one writes."""

from __future__ import annotations

import fcntl
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from hermes_dist.errors import ConfigError
from hermes_dist.scaling import sweep_runner
from hermes_dist.scaling.laws import Law, LawFit, NotEnoughPoints
from hermes_dist.scaling.sweep import Member, StopConfig, SweepConfig, members, read_sweep
from hermes_dist.scaling.sweep_report import report
from hermes_dist.scaling.sweep_results import State, law_of, read_state, result_row, throughput_of, write_state
from hermes_dist.scaling.sweep_runner import Runner, divergence

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
        row = {"step": step, "loss": loss, "step_s": 0.1, "data_wait_s": 0.01, "samples_per_s": 20.0}
        print(json.dumps(row), file=file)
'''

FAKE_EVALUATE = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run") + 1]) / "evaluation"
folder.mkdir(exist_ok=True)
if "--loss" in sys.argv:
    (folder / "val_loss.json").write_text(json.dumps({"loss": 0.25}))
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


def synthetic_rows(law: Law) -> list[dict[str, Any]]:
    rows = []
    for base, n in ((8, 1e6), (16, 4e6), (24, 9e6), (32, 16e6)):
        for steps in (100, 400, 1600):
            d = 4 * steps
            rows.append(
                {
                    "member": f"b{base}-{steps}",
                    "state": "done",
                    "ranks": 1,
                    "method": "hermes",
                    "parameters": n,
                    "samples": d,
                    "flops_per_sample": 2e3 * n,
                    "loss": float(law.loss(n, d)),
                    "dice": 0.5,
                    "dice_by_dataset": {"a": 0.5},
                    "backbone_parameters": n / 4,
                    "seed": 0,
                    "zero_stage": 1,
                    "global_batch": 4,
                    "step_s": 0.2,
                    "data_wait_s": 0.0,
                    "samples_per_s": 20.0,
                    "reason": "",
                }
            )
    return rows


def test_the_report_of_a_scaling_study_is_one_page_with_its_law(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    rows = synthetic_rows(Law(0.2, 400.0, 4.0, 0.5, 0.5))
    fit = law_of(rows, bootstrap=5)
    assert isinstance(fit, LawFit)
    assert fit.law.alpha == pytest.approx(0.5, abs=0.02)
    page = report(sweep, members(sweep, CONFIGS), rows, "python launch/sweep.py --config scaling.json")
    assert page.count("<svg") == 3
    assert "gains +0.000" in page
    assert "95 % low" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://creativecommons", "").replace(
        "http://purl.org", ""
    )
    assert isinstance(law_of(rows[:4]), NotEnoughPoints)
    assert "not enough points" in report(sweep, members(sweep, CONFIGS), rows[:4], "x")


def test_the_report_of_a_throughput_study(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, study="throughput")
    rows = [
        {
            **synthetic_rows(Law(0.2, 1, 1, 0.5, 0.5))[0],
            "ranks": w,
            "zero_stage": z,
            "global_batch": 2 * w,
            "step_s": 0.2 + 0.02 * math.log2(w),
        }
        for w in (1, 2, 4)
        for z in (1, 3)
    ]
    runs, _ = throughput_of(rows)
    assert len(runs) == 6
    page = report(sweep, members(sweep, CONFIGS), rows, "x")
    assert "efficiency" in page
    assert "Assumes a device for every rank" in page
    assert "data_wait_per_sample_s" in page


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
