"""Where the members of a sweep run: child processes here, tasks of a Ray cluster, or a Slurm array; and the live table."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hermes_dist.config import MonitorConfig
from hermes_dist.errors import UsageError
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.scaling.sweep_identity import check_unchanged, lacking
from hermes_dist.scaling.sweep_results import State, law_values, read_state, result_row, write_state
from hermes_dist.scaling.sweep_runner import Runner, to_run
from hermes_dist.telemetry.jsonl import last_row
from hermes_dist.telemetry.telemetry import Telemetry

Update = Callable[[dict[str, State]], None]
Backend = Callable[[SweepConfig, Sequence[Member], Path, Update], None]


class LiveTable:
    """A live table on the terminal, a line per change elsewhere; the same numbers as metrics for *Scaling studies*."""

    def __init__(self, sweep: SweepConfig, members: Sequence[Member]) -> None:
        self._sweep, self._members, self._last = sweep, {m.name: m for m in members}, dict[str, str]()
        self._rows: dict[str, dict[str, Any]] = {}
        self._telemetry = Telemetry(Path(sweep.output_dir) / sweep.name, MonitorConfig(), run_name=sweep.name)
        console = Console()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self._live:
            self._live.start()

    def update(self, states: dict[str, State]) -> None:
        """Called about once a second."""
        counts = Counter(state.state for state in states.values())
        for name in ("waiting", "running", "done", "diverged", "failed"):
            self._telemetry.set("hermes_sweep_runs", counts[name], state=name)
        changed = {name: state for name, state in states.items() if self._last.get(name) != state.state}
        ended = [name for name, state in changed.items() if state.state in ("done", "diverged")]
        self._last |= {name: state.state for name, state in changed.items()}
        for name in ended:
            self._rows[name] = result_row(self._members[name], states[name], self._sweep)
            self._export(name)
        if ended:
            self._export_law()
        if self._live:
            self._live.update(self._table(states), refresh=True)
        else:
            for name, state in changed.items():
                print(f"{name}: {state.state} {state.reason}".rstrip(), flush=True)

    def close(self) -> None:
        """End the table and the endpoint."""
        if self._live:
            self._live.stop()
        self._telemetry.close()

    def _export(self, name: str) -> None:
        row = self._rows[name]
        if row["loss"] is not None:
            labels = {"member": name, "parameters": str(row["parameters"]), "samples": str(row["samples"])}
            self._telemetry.set("hermes_sweep_loss", row["loss"], **labels)
        if row["samples_per_s"] is not None:
            labels = {"member": name, "ranks": str(row["ranks"]), "mode": f"ZeRO-{row['zero_stage']}"}
            self._telemetry.set("hermes_sweep_samples_per_second", row["samples_per_s"], **labels)

    def _export_law(self) -> None:
        """The fit over what is there, with a quick bootstrap; the report's own is thorough."""
        rows = list(self._rows.values())
        for (law, parameter, bound), value in law_values(rows, self._sweep.study, bootstrap=40).items():
            self._telemetry.set("hermes_law_value", value, law=law, parameter=parameter, bound=bound)

    def _table(self, states: dict[str, State]) -> Table:
        table = Table(title=f"sweep {self._sweep.name}")
        for column in ("member", "state", "tries", "step", "loss", "samples/s", "reason"):
            table.add_column(column)
        for name, state in states.items():
            row = self._rows.get(name) or (last_row(self._members[name].metrics) if state.state == "running" else None) or {}
            steps = row.get("steps", row.get("step"))
            numbers = [f"{row[key]:.4g}" if row.get(key) is not None else "" for key in ("loss", "samples_per_s")]
            table.add_row(name, state.state, str(state.tries), "" if steps is None else str(steps), *numbers, state.reason)
        return table


def unfinished(sweep: SweepConfig, members: Sequence[Member]) -> list[Member]:
    """Members that have something left to do. Raises ConfigError for runs of an earlier form of the sweep."""
    check_unchanged(members)
    return [m for m in members if to_run(read_state(m), lacking(m, sweep)).state == "waiting"]


def cluster_has_gpus(nodes: Sequence[Mapping[str, Any]], members: Sequence[Member]) -> bool:
    """Of `ray.nodes()`: whether members are to ask for GPUs, one a rank.

    Raises:
        UsageError: a member has more ranks than any node has CPUs, or GPUs where the cluster has some; it would wait for ever.
    """
    held: list[Mapping[str, float]] = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = [name for name in ("CPU", "GPU") if name == "CPU" or any(node.get(name, 0) for node in held)]
    for member in members:
        if not any(all(node.get(name, 0) >= member.ranks for name in wanted) for node in held):
            largest = [f"{max((node.get(name, 0) for node in held), default=0):g} {name}s" for name in wanted]
            raise UsageError(
                f"{member.name}: {member.ranks} ranks need a node with as many {' and '.join(f'{name}s' for name in wanted)}; "
                f"the most that a node of this Ray cluster has: {', '.join(largest)}. Take fewer ranks, or add such a node"
            )
    return "GPU" in wanted


def without_backend(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments without `--backend NAME`."""
    kept = [a for a in arguments if not a.startswith("--backend=")]
    if "--backend" in kept:
        del kept[(at := kept.index("--backend")) : at + 2]
    return kept


def run_local(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """`at_once` child processes at a time."""
    Runner(sweep, members, train, update).run()


def run_on_ray(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """One Ray task a member, each with as many CPUs as ranks, and GPUs where the cluster has some.

    Members run in this folder, which all nodes must see at the same path.

    Raises:
        UsageError: there is no cluster, no node holds a member, or a node does not see this folder.
    """
    import ray  # here, so that a local sweep does not start it
    from ray.exceptions import RayError

    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except ConnectionError as error:
            raise UsageError(f"no Ray cluster: {error}; start one with `ray start --head`, or set RAY_ADDRESS") from None

    folder, threads = Path.cwd(), os.environ.get("OMP_NUM_THREADS", "1")

    def work(member: Member) -> None:
        if not folder.is_dir():
            raise UsageError(
                f"{folder} is not on the Ray node {os.uname().nodename}: start the sweep in a folder of a shared file system "
                "that all nodes mount at the same path"
            )
        os.chdir(folder)
        os.environ["OMP_NUM_THREADS"] = threads  # Ray sets it to the CPUs of the task, and each of its ranks would take as many
        Runner(sweep, [member], train, lambda _: None).run()

    waiting, lost = unfinished(sweep, members), Counter[str]()
    gpus = cluster_has_gpus(ray.nodes(), waiting)
    task: Any = ray.remote(max_retries=0)(work)
    pending: dict[Any, Member] = {}
    while waiting or pending:
        while waiting and len(pending) < sweep.at_once:
            member = waiting.pop(0)
            resources = {"num_cpus": member.ranks, "num_gpus": member.ranks if gpus else 0}
            pending[task.options(**resources).remote(member)] = member
        ready, _ = ray.wait(list(pending), timeout=2)
        for done in ready:
            member = pending.pop(done)
            try:
                ray.get(done)
            except UsageError as error:  # Ray's copy of it begins with the traceback of the node
                raise UsageError(str(getattr(error, "cause", error))) from None
            except RayError as error:  # its node or worker died: somewhere else it resumes from its checkpoint
                lost[member.name] += 1
                if lost[member.name] <= sweep.retries:
                    waiting.append(member)
                else:
                    write_state(member, State("failed", lost[member.name], f"Ray: {error}".splitlines()[0]))
        submitted = {member.name for member in pending.values()}  # some of them wait for a node
        update({m.name: read_state(m, alive=m.name in submitted) for m in members})


def write_slurm(sweep: SweepConfig, members: Sequence[Member], train: Path, update: Update) -> None:
    """Write an array job, one task a member; nothing is submitted. Array tasks that died are submitted again by their index.

    Slurm's signal goes to the batch shell (`B:`), which has become the sweep by then: it stops its member, which writes a
    checkpoint. Without `B:` it would go to job steps only, and there is none.
    """
    waiting = unfinished(sweep, members)
    folder = Path(sweep.output_dir) / sweep.name
    script = folder / "array.sbatch"
    update({m.name: read_state(m) for m in members})
    if not waiting:
        script.unlink(missing_ok=True)  # an empty array is an error, and an older one would run what is finished
        print("nothing is left to do: no array is written")
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join([sys.executable, str(train.with_name("sweep.py")), *without_backend(sys.argv[1:])])
    indices = ",".join(str(m.index) for m in waiting)
    script.write_text(
        f"#!/bin/bash\n#SBATCH --job-name={sweep.name}\n#SBATCH --array={indices}%{sweep.at_once}\n"
        f"#SBATCH --ntasks=1\n#SBATCH --cpus-per-task={max(m.ranks for m in waiting)}\n"
        f"#SBATCH --output={folder}/slurm-%a.txt\n#SBATCH --signal=B:TERM@120\n"
        f"cd {shlex.quote(str(Path.cwd()))}\nexec {command} --member $SLURM_ARRAY_TASK_ID\n"
    )
    print(f"wrote {script}; submit it with: sbatch {script}")


BACKENDS: dict[str, Backend] = {"local": run_local, "ray": run_on_ray, "slurm": write_slurm}


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All members as parquet, written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    flat = [row | {"dice_by_dataset": json.dumps(row["dice_by_dataset"])} for row in rows]  # members may know other datasets
    pq.write_table(pa.Table.from_pylist(flat), temporary)
    temporary.replace(path)


def write_report(folder: Path, page: str) -> list[Path]:
    """`report.html`, and its figures as files of their own."""
    figures = [(folder / f"figure{i}.svg", svg) for i, svg in enumerate(re.findall(r"<svg.*?</svg>", page, re.DOTALL), start=1)]
    files = [(folder / "report.html", page), *figures]
    for path, text in files:
        write_text(path, text)
    return [path for path, _ in files]


def write_text(path: Path, text: str) -> None:
    """A file that is the old one or complete: array tasks that end together write the same report."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
