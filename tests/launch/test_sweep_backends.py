"""Where members run: a Slurm array as a script, a Ray cluster that loses a worker, and the live table with its metrics."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))  # as `python launch/sweep.py` does

import sweep_backends  # noqa: E402

from hermes_dist.config import MonitorConfig  # noqa: E402
from hermes_dist.errors import UsageError  # noqa: E402
from hermes_dist.scaling.sweep import SweepConfig, members  # noqa: E402
from hermes_dist.scaling.sweep_results import State, read_state, write_state  # noqa: E402
from tests.scaling.test_sweep import FAKE_TRAIN  # noqa: E402

CONFIGS = ROOT / "configs"
RAY_PROGRAM = """
import sys
from pathlib import Path
import ray
sys.path.insert(0, "launch")
from hermes_dist.scaling.sweep import members, read_sweep
from sweep_backends import run_on_ray
folder = Path(sys.argv[1])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
sweep = read_sweep(folder / "sweep.json")
states = {}
run_on_ray(sweep, members(sweep, Path("configs")), folder / "train.py", states.update)
ray.shutdown()
for name, state in sorted(states.items()):
    print(name, state.state)
"""
KILLS_ITS_WORKER = """
if pairs["run.seed"] == "16" and not (run / "killed").exists():
    (run / "killed").touch()
    os.kill(os.getppid(), 9)
"""


def run_program(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), str(folder)],
        cwd=ROOT,
        env={**sweep_backends.os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def sweep_of(folder: Path, **changes: Any) -> SweepConfig:
    data: dict[str, Any] = {"name": "s", "base": "demo.json", "output_dir": str(folder), "grid": {"run.seed": [0, 1]}}
    data["overrides"] = {"train.max_steps": 30, "train.global_batch": 4}
    return SweepConfig.model_validate({**data, **changes})


def test_a_slurm_array_runs_one_member_a_task_from_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run as Slurm runs it, with a stand-in for sweep.py that says how it was called."""
    (tmp_path / "sweep.py").write_text("import json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))\n")
    monkeypatch.chdir(tmp_path)
    stores = 'data.stores=["a store"]'
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--config", "s.json", "--backend", "slurm", stores])
    sweep = sweep_of(tmp_path, at_once=3, points=[{"ranks": 2}])
    chosen = members(sweep, CONFIGS)
    write_state(chosen[0], State("done", 1))
    sweep_backends.write_slurm(sweep, chosen, tmp_path / "train.py", lambda _: None)
    script = tmp_path / "s" / "array.sbatch"
    assert "#SBATCH --array=1%3\n" in script.read_text(), "the finished member is left out"
    assert "--cpus-per-task=2" in script.read_text()
    assert "--signal=B:TERM@120\n" in script.read_text(), "to the batch shell, which the sweep replaces"
    task = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(script)], env=task, cwd="/", capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [str(tmp_path), ["--config", "s.json", stores, "--member", "1"]]


def test_no_array_is_left_when_nothing_is_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(tmp_path)
    chosen = members(sweep, CONFIGS)
    script = tmp_path / "s" / "array.sbatch"
    sweep_backends.write_slurm(sweep, chosen, tmp_path / "train.py", lambda _: None)
    assert script.exists()
    for member in chosen:
        write_state(member, State("done", 1))
    sweep_backends.write_slurm(sweep, chosen, tmp_path / "train.py", lambda _: None)
    assert not script.exists()
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_member_that_no_node_holds_is_refused(tmp_path: Path) -> None:
    wide = members(sweep_of(tmp_path, points=[{"ranks": 4}]), CONFIGS)
    cpu, dead = {"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    assert not sweep_backends.cluster_has_gpus([cpu, dead], wide)
    assert sweep_backends.cluster_has_gpus([cpu, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}], wide)
    with pytest.raises(UsageError, match=r"4 ranks need a node.*2 CPUs"):
        sweep_backends.cluster_has_gpus([{"Alive": True, "Resources": {"CPU": 2.0}}, dead], wide)
    with pytest.raises(UsageError, match="1 GPUs"):
        sweep_backends.cluster_has_gpus([{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}], wide)


def test_running_is_what_the_state_file_says(tmp_path: Path) -> None:
    member = members(sweep_of(tmp_path), CONFIGS)[0]
    assert read_state(member, alive=True).state == "waiting", "submitted, and no node has taken it yet"
    write_state(member, State("running", 1))
    assert read_state(member, alive=True).state == "running"
    assert read_state(member).state == "waiting"


@pytest.mark.parametrize("given", [["--backend", "ray", "x=1"], ["x=1", "--backend=ray"], ["x=1"]])
def test_the_backend_is_taken_out_of_the_arguments(given: list[str]) -> None:
    assert sweep_backends.without_backend(given) == ["x=1"]


def test_the_table_lives_and_its_numbers_are_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(sweep_backends, "Console", lambda: screen)
    monkeypatch.setattr(sweep_backends, "MonitorConfig", lambda: MonitorConfig(prometheus_port=0))
    sweep = sweep_of(tmp_path)
    chosen = members(sweep, CONFIGS)
    table = sweep_backends.LiveTable(sweep, chosen)
    for member in chosen:
        member.run_dir.mkdir(parents=True)
        row = {"step": 7, "loss": 0.4321, "step_s": 0.5, "data_wait_s": 0.1, "samples_per_s": 8.0}
        member.metrics.write_text(json.dumps(row) + "\n")
    table.update({"seed0": State("running", 1), "seed1": State("waiting")})
    running = screen.file.getvalue()  # type: ignore[attr-defined]
    table.update({"seed0": State("done", 1), "seed1": State("failed", 2, "exit code 3")})
    with urllib.request.urlopen(f"http://{table._telemetry.address}/metrics", timeout=10) as answer:
        served = answer.read().decode()
    table.close()
    assert "0.4321" in running
    assert "exit code 3" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert 'hermes_sweep_runs{rank="0",run="s",state="failed"} 1.0' in served
    assert not re.search("^hermes_(world_size|checkpoint_timestamp_seconds){", served, re.M), "a sweep itself does not train"
    assert 'hermes_sweep_samples_per_second{member="seed0",mode="ZeRO-1",rank="0",ranks="1",run="s"} 8.0' in served


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_ray_node_without_the_folder_of_the_call_is_named(tmp_path: Path) -> None:
    """The driver says that it is in a folder which the worker does not see."""
    sweep = sweep_of(tmp_path, grid={"run.seed": [0]})
    (tmp_path / "sweep.json").write_text(sweep.model_dump_json())
    program = tmp_path / "on_ray.py"
    elsewhere = 'Path.cwd = staticmethod(lambda: Path("/only/here"))\nstates = {}'
    program.write_text(RAY_PROGRAM.replace("states = {}", elsewhere, 1))
    done = run_program(program, tmp_path)
    assert done.returncode != 0
    assert "UsageError: /only/here is not on the Ray node" in done.stderr.splitlines()[-1], done.stderr[-3000:]


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_ray_cluster_runs_the_members_and_a_lost_worker_costs_a_try(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FAKE_TRAIN.replace("with (run /", f"{KILLS_ITS_WORKER}with (run /", 1))
    sweep = sweep_of(tmp_path, grid={"run.seed": [0, 13, 16]}, at_once=2)
    (tmp_path / "sweep.json").write_text(sweep.model_dump_json())
    program = tmp_path / "on_ray.py"
    program.write_text(RAY_PROGRAM)
    done = run_program(program, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-4:-1] == ["seed0 done", "seed13 done", "seed16 done"]
    assert (tmp_path / "s" / "seed16" / "killed").exists()
