"""What the members of a sweep have given so far: one flat row each, read from the run directories, and the fits over them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hermes_dist.errors import ConfigError
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.laws import LawFit, NotEnoughPoints, Run, fit_law
from hermes_dist.scaling.model_costs import backbone_parameters, parameter_count, training_flops
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.scaling.throughput import Measured, ThroughputFit, TooFewRuns, fit_throughput
from hermes_dist.tasks import TaskTable
from hermes_dist.telemetry.jsonl import read_rows

STATE_FILE = "sweep_state.json"
PARAMETERS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class State:
    """Where a member stands: waiting, running, done, diverged or failed; `reason` in words for the last two."""

    state: str = "waiting"
    tries: int = 0
    reason: str = ""


def read_state(member: Member) -> State:
    """From the member's directory; `running` in the file means that the sweep was killed: it is waiting again."""
    path = member.run_dir / STATE_FILE
    if not path.is_file():
        return State()
    state = State(**json.loads(path.read_text()))
    return State("waiting", 0, state.reason) if state.state == "running" else state


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
    config = member.config()
    row: dict[str, Any] = {
        "member": member.name, "state": state.state, "reason": state.reason, "ranks": member.ranks,
        "method": config.model.method, "base_channels": config.model.base_channels, "seed": config.run.seed,
        "global_batch": config.train.global_batch, "max_steps": config.train.max_steps,
        "zero_stage": int(config.deepspeed.get("zero_optimization", {}).get("stage", 0)),
        "samples": config.train.global_batch * config.train.max_steps,
        **_sizes(member),
    }  # fmt: skip
    steps = list(read_rows(member.run_dir / "metrics.jsonl"))
    row |= {"steps": len(steps), "loss": None, "train_loss": None}
    row |= dict.fromkeys(("step_s", "data_wait_s", "samples_per_s"))
    if steps:
        tail = steps[-max(1, round(sweep.loss_fraction * len(steps))) :]
        late = steps[len(steps) // 2 :]
        row["loss"] = row["train_loss"] = _mean([s.get("loss") for s in tail])
        for key in ("step_s", "data_wait_s", "samples_per_s"):
            row[key] = float(np.median([s[key] for s in late]))
    if sweep.held_out:
        row["loss"] = _read(member.evaluation(f"{sweep.held_out.split}_loss")).get("loss")
    return row | _scores(member, sweep) | {"devices": _devices(member)}


def _sizes(member: Member) -> dict[str, Any]:
    path = member.run_dir / "tasks.json"
    sizes: dict[str, Any] = dict.fromkeys(("parameters", "backbone_parameters", "flops_per_sample"))
    if not path.is_file():
        return sizes
    tasks, config = TaskTable.from_json(json.loads(path.read_text())), member.config()
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


def _scores(member: Member, sweep: SweepConfig) -> dict[str, Any]:
    """Dice of the datasets that the run was trained on: one by one, and their mean."""
    result = _read(member.evaluation(sweep.evaluate)) if sweep.evaluate else {}
    weights = member.config().data.mixture.weights
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
    return len(found["gpus"]) or max(1, found["cpu_count"] // int(found["omp_num_threads"] or 1))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def law_of(rows: Sequence[dict[str, Any]], *, bootstrap: int = 200) -> LawFit | NotEnoughPoints:
    """The scaling law over the finished runs: loss against parameters and samples."""
    runs = [Run(r["parameters"], r["samples"], r["loss"]) for r in finished(rows) if r["parameters"] and r["loss"]]
    return fit_law(runs, bootstrap=bootstrap)


def law_values(rows: Sequence[dict[str, Any]], study: str, *, bootstrap: int = 200) -> dict[tuple[str, str], float]:
    """(parameter, bound) → value of the study's fit, bounds `value`, `low`, `high`; empty where there are not enough runs."""
    if study == "throughput":
        fit = throughput_of(rows)[1]
        return {(name, "value"): value for name, value in fit.terms.items()} if isinstance(fit, ThroughputFit) else {}
    law = law_of(rows, bootstrap=bootstrap)
    if isinstance(law, NotEnoughPoints):
        return {}
    bounds = {"value": law.law, "low": law.low, "high": law.high}
    return {(name, bound): getattr(fitted, name) for bound, fitted in bounds.items() for name in PARAMETERS}


def throughput_of(rows: Sequence[dict[str, Any]]) -> tuple[list[Measured], ThroughputFit | TooFewRuns]:
    """Measured runs, step and data wait apart, and the fit over them."""
    runs = [
        Measured(
            r["ranks"],
            r["zero_stage"],
            r["global_batch"],
            r["parameters"] or 0,
            r["step_s"] - r["data_wait_s"],
            r["data_wait_s"],
            r.get("devices"),
        )
        for r in finished(rows)
        if r["step_s"]
    ]
    return runs, fit_throughput(runs)


def finished(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of members that reached their last step."""
    return [row for row in rows if row["state"] == "done"]
