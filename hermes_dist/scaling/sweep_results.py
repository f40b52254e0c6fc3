"""What the members of a sweep have given so far: one flat row each, read from the run directories, and the fits over them."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.laws import LawFit, NotEnoughPoints, Run, fit_law
from hermes_dist.scaling.model_costs import backbone_parameters, parameter_count, training_flops
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.scaling.sweep_identity import config_of, lacking
from hermes_dist.scaling.throughput import Measured, ThroughputFit, TooFewRuns, fit_throughput
from hermes_dist.tasks import TaskTable
from hermes_dist.telemetry.jsonl import read_rows
from hermes_dist.telemetry.rows import data_stall_s

STATE_FILE = "sweep_state.json"
PARAMETERS = ("E", "A", "B", "alpha", "beta")
OWN_COLUMNS = (
    "data.mixture.weights",
    "model.base_channels",
    "model.blocks",
    "model.method",
    "ranks",
    "run.seed",
    "train.max_steps",
)
"""Keys of a sweep that are sizes, budgets or repetitions, or have columns of their own. All others make different settings."""
THROUGHPUT_COLUMNS = ("deepspeed.zero_optimization.stage", "train.global_batch")
"""Further ones of a throughput study: terms of its fit know them."""
TIED_TO_SIZE = ("optimizer.lr", "train.micro_batch")
"""Keys that points may give each size as its recipe; in the grid they are settings."""


@dataclass(frozen=True)
class State:
    """Where a member stands: waiting, running, done, diverged or failed; `reason` in words for the last two."""

    state: str = "waiting"
    tries: int = 0
    reason: str = ""


def read_state(member: Member, *, alive: bool = False) -> State:
    """From the member's directory. `running` in the file means that the sweep was killed, so it is waiting again; unless the
    caller knows that it is `alive`."""
    path = member.run_dir / STATE_FILE
    if not path.is_file():
        return State()
    state = State(**json.loads(path.read_text()))
    return State("waiting", 0, state.reason) if state.state == "running" and not alive else state


def write_state(member: Member, state: State) -> None:
    """Atomically."""
    member.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = member.run_dir / f".{STATE_FILE}"
    temporary.write_text(json.dumps(state.__dict__))
    temporary.replace(member.run_dir / STATE_FILE)


def result_row(member: Member, state: State, sweep: SweepConfig) -> dict[str, Any]:
    """A flat row of the results table. Missing values are None; times are medians over the second half of the steps.

    `loss` is what a law is fitted to: on held-out patches where the sweep asks for it, else `train_loss`.
    """
    config = config_of(member)
    row: dict[str, Any] = {
        "member": member.name, "state": state.state, "reason": state.reason, "ranks": member.ranks,
        "method": config.model.method, "base_channels": config.model.base_channels, "seed": config.run.seed,
        "global_batch": config.train.global_batch, "max_steps": config.train.max_steps,
        "zero_stage": int(config.deepspeed.get("zero_optimization", {}).get("stage", 0)),
        "samples": config.train.global_batch * config.train.max_steps,
        "micro_steps": math.ceil(config.train.global_batch / (member.ranks * config.train.micro_batch)),
        "micro_batch": config.train.micro_batch,
        "setting": _setting(config, sweep), "mixture": _text(config.data.mixture.weights),
        **_sizes(member, config),
    }  # fmt: skip
    steps = list(read_rows(member.run_dir / "metrics.jsonl"))
    row |= {"steps": len(steps), "loss": None, "train_loss": None}
    row |= dict.fromkeys(("step_s", "data_wait_s", "samples_per_s"))
    if steps:
        tail = steps[-max(1, round(sweep.loss_fraction * len(steps))) :]
        late = steps[len(steps) // 2 :]
        row["loss"] = row["train_loss"] = _mean([s.get("loss") for s in tail])
        for key in ("step_s", "samples_per_s"):
            row[key] = float(np.median([s[key] for s in late]))
        row["data_wait_s"] = float(np.median([data_stall_s(s) for s in late]))
    if sweep.held_out:
        path = member.held_out(sweep.held_out)
        row["loss"] = None if path in lacking(member, sweep) else _read(path).get("loss")
    return row | _scores(member, sweep, config) | {"devices": _devices(member)}


def _setting(config: Config, sweep: SweepConfig) -> str:
    """`key=value` of what the sweep varies besides method, size, budget and seed (and in a throughput study the batch and ZeRO
    stage); runs of different settings do not mix."""
    tied = {key for point in sweep.points for key in point if key in TIED_TO_SIZE} - sweep.grid.keys()
    own = {*OWN_COLUMNS, *(THROUGHPUT_COLUMNS if sweep.study == "throughput" else ()), *tied}
    varied = {*sweep.grid, *(key for point in sweep.points for key in point)} - own
    parts: list[str] = []
    for key in sorted(varied):
        value: Any = config.model_dump(mode="json")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        parts.append(f"{key}={_text(value)}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _sizes(member: Member, config: Config) -> dict[str, Any]:
    path = member.run_dir / "tasks.json"
    sizes: dict[str, Any] = dict.fromkeys(("parameters", "backbone_parameters", "flops_per_sample"))
    if not path.is_file():
        return sizes
    tasks = TaskTable.from_json(json.loads(path.read_text()))
    columns = round(float(np.mean([len(d.classes) for d in tasks.datasets])))
    request = Request(config.data.patch_vox_zyx, max(columns, 1), tasks.n_tasks, len(tasks.modalities))
    with contextlib.suppress(ConfigError):  # a backbone without formula: such a run is listed but not fitted
        sizes["parameters"] = parameter_count(config.model, request)
        sizes["backbone_parameters"] = backbone_parameters(config.model)
        sizes["flops_per_sample"] = training_flops(config.model, request)
    return sizes


def _mean(values: list[float | None]) -> float | None:
    good = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(good)) if len(good) == len(values) and good else None


def _scores(member: Member, sweep: SweepConfig, config: Config) -> dict[str, Any]:
    """Dice of the datasets that the run was trained on: one by one, and their mean."""
    result = _read(member.evaluation(sweep.evaluate)) if sweep.evaluate else {}
    weights = config.data.mixture.weights
    scores = {
        entry["dataset"]: entry["dice"]
        for entry in result.get("per_dataset", ())
        if entry.get("dice") is not None and (not isinstance(weights, dict) or weights.get(entry["dataset"], 0) > 0)
    }
    return {"dice": _mean(list(scores.values())), "dice_by_dataset": scores}


def _devices(member: Member) -> int | None:
    """Cards, or cores by threads per rank, of the host that the run started on."""
    found = _read(member.run_dir / "environment.json")
    if not found:
        return None
    threads = found.get("threads") or int(found["omp_num_threads"] or 1)  # older runs recorded the variable only
    return len(found["gpus"]) or max(1, found["cpu_count"] // threads)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def like_groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Finished runs that one law, or one fit of step times, may describe: of one method, one mixture, and one value of every
    other key that the sweep varies. Sizes, budgets, seeds and what a point ties to them differ inside a group, and in a
    throughput study ranks, batches and ZeRO stages."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in finished(rows):
        mixture = f"weights={row['mixture']}" if row.get("mixture") else ""
        groups[", ".join(part for part in (row["method"], row.get("setting"), mixture) if part)].append(row)
    return dict(groups)


def law_of(rows: Sequence[dict[str, Any]], *, bootstrap: int = 200) -> LawFit | NotEnoughPoints:
    """The scaling law over the finished runs of one group: loss against parameters and samples."""
    runs = [Run(r["parameters"], r["samples"], r["loss"]) for r in finished(rows) if r["parameters"] and r["loss"]]
    return fit_law(runs, bootstrap=bootstrap)


def law_values(rows: Sequence[dict[str, Any]], study: str, *, bootstrap: int = 200) -> dict[tuple[str, str, str], float]:
    """(law, parameter, bound) → value of the study's fits, bounds `value`, `low`, `high`; none where there are too few runs.

    `law` is the study; with the group's name behind it where there are several.
    """
    found: dict[tuple[str, str, str], float] = {}
    groups = like_groups(rows)
    for group, members in groups.items():
        name = study if len(groups) == 1 else f"{study}: {group}"
        if study == "throughput":
            fit = throughput_of(members)[1]
            found |= {(name, key, "value"): v for key, v in fit.terms.items()} if isinstance(fit, ThroughputFit) else {}
            continue
        law = law_of(members, bootstrap=bootstrap)
        if isinstance(law, LawFit):
            bounds = {"value": law.law, "low": law.low, "high": law.high}
            found |= {(name, key, bound): getattr(fitted, key) for bound, fitted in bounds.items() for key in PARAMETERS}
    return found


def throughput_of(rows: Sequence[dict[str, Any]]) -> tuple[list[Measured], ThroughputFit | TooFewRuns]:
    """Measured runs of one group, step and data wait apart, and the fit over them. Runs of unknown parameters are left out."""
    runs = [
        Measured(
            r["ranks"],
            r["zero_stage"],
            r["global_batch"],
            r["parameters"],
            r["step_s"] - r["data_wait_s"],
            r["data_wait_s"],
            r.get("devices"),
            r.get("micro_steps") or 1,
            r.get("micro_batch"),
        )
        for r in finished(rows)
        if r["step_s"] and r["parameters"]
    ]
    return runs, fit_throughput(runs)


def finished(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of members that reached their last step."""
    return [row for row in rows if row["state"] == "done"]
