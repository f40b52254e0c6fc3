"""Where the members of a sweep run: child processes here, tasks of a Ray cluster, or a Slurm array; and the live table."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from hermes_dist.config import MonitorConfig
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.scaling.sweep_results import State, read_state, result_row
from hermes_dist.scaling.sweep_runner import Runner, to_run
from hermes_dist.telemetry.telemetry import Telemetry

Update = Callable[[dict[str, State]], None]
Backend = Callable[[SweepConfig, Sequence[Member], Path, Update], None]


class LiveTable:
    """A table on the terminal, a line per change elsewhere; the same numbers as metrics for the dashboard *Scaling studies*."""

    def __init__(self, sweep: SweepConfig, members: Sequence[Member]) -> None:
        self._sweep, self._members, self._last = sweep, {m.name: m for m in members}, dict[str, str]()
        self._console = Console()
        self._telemetry = Telemetry(Path(sweep.output_dir) / sweep.name, MonitorConfig(), run_name=sweep.name)

    def update(self, states: dict[str, State]) -> None:
        """Called about once a second."""
        counts = Counter(state.state for state in states.values())
        for name in ("waiting", "running", "done", "diverged", "failed"):
            self._telemetry.set("hermes_sweep_runs", counts[name], state=name)
        changed = {name: state for name, state in states.items() if self._last.get(name) != state.state}
        for name, state in changed.items():
            self._last[name] = state.state
            if state.state in ("done", "diverged"):
                self._export(name, state)
        if changed:
            self._print(states, changed)

    def close(self) -> None:
        """End the endpoint."""
        self._telemetry.close()

    def _export(self, name: str, state: State) -> None:
        row = result_row(self._members[name], state, self._sweep)
        if row["loss"] is not None:
            labels = {"member": name, "parameters": str(row["parameters"]), "samples": str(row["samples"])}
            self._telemetry.set("hermes_sweep_loss", row["loss"], **labels)
        if row["samples_per_s"] is not None:
            mode = f"ZeRO-{row['zero_stage']}"
            self._telemetry.set(
                "hermes_sweep_samples_per_second", row["samples_per_s"], member=name, ranks=str(row["ranks"]), mode=mode
            )

    def _print(self, states: dict[str, State], changed: dict[str, State]) -> None:
        if not self._console.is_terminal:
            for name, state in changed.items():
                print(f"{name}: {state.state} {state.reason}".rstrip(), flush=True)
            return
        table = Table(title=f"sweep {self._sweep.name}")
        for column in ("member", "state", "tries", "loss", "samples/s", "reason"):
            table.add_column(column)
        for name, state in states.items():
            row = result_row(self._members[name], state, self._sweep) if state.state != "waiting" else {}
            numbers = [f"{row[key]:.4g}" if row.get(key) is not None else "" for key in ("loss", "samples_per_s")]
            table.add_row(name, state.state, str(state.tries), *numbers, state.reason)
        self._console.clear()
        self._console.print(table)


def run_local(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """`at_once` child processes at a time."""
    Runner(sweep, members, train, update).run()


def run_on_ray(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """One Ray task a member, each with as many CPUs as ranks; the run directories must be on a shared file system."""
    import ray  # here, so that a local sweep does not start it

    ray.init(address="auto", log_to_driver=False)

    def work(member: Member) -> None:
        Runner(sweep, [member], train, lambda _: None).run()

    task: Any = ray.remote(max_retries=0)(work)
    waiting = [m for m in members if to_run(read_state(m)).state == "waiting"]
    pending: list[Any] = []
    while waiting or pending:
        while waiting and len(pending) < sweep.at_once:
            member = waiting.pop(0)
            pending.append(task.options(num_cpus=member.ranks).remote(member))
        ready, pending = ray.wait(pending, timeout=5)
        ray.get(ready)
        update({m.name: read_state(m) for m in members})


def write_slurm(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """Write an array job, one task a member; nothing is submitted. Array tasks that died are submitted again by their index."""
    waiting = [m for m in members if to_run(read_state(m)).state == "waiting"]
    folder = Path(sweep.output_dir) / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(sys.argv[1:]).replace("--backend slurm", "").strip()
    indices = ",".join(str(m.index) for m in waiting)
    script = folder / "array.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --job-name={sweep.name}\n#SBATCH --array={indices}%{sweep.at_once}\n"
        f"#SBATCH --ntasks=1\n#SBATCH --cpus-per-task={max((m.ranks for m in members), default=1)}\n"
        f"#SBATCH --output={folder}/slurm-%a.txt\ncd {train.parent.parent}\n"
        f"{sys.executable} launch/sweep.py {command} --member $SLURM_ARRAY_TASK_ID\n"
    )
    update({m.name: read_state(m) for m in members})
    print(f"wrote {script}; submit it with: sbatch {script}")


BACKENDS: dict[str, Backend] = {"local": run_local, "ray": run_on_ray, "slurm": write_slurm}


def evaluate_members(sweep: SweepConfig, members: Sequence[Member]) -> None:
    """Evaluate finished members that were not evaluated yet, if the sweep asks for it."""
    for member in members if sweep.evaluate else ():
        done = read_state(member).state == "done" and not (member.run_dir / "evaluation" / f"{sweep.evaluate}.json").exists()
        if done:
            script = str(Path(__file__).with_name("evaluate.py"))
            subprocess.run([sys.executable, script, "--run", str(member.run_dir), "--split", str(sweep.evaluate)], check=False)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All members as parquet, written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    temporary.replace(path)
