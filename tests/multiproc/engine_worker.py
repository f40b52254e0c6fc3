"""Runs engine cases on one rank. Usage: engine_worker.py CASES.json OUT.json; rank 0 writes the results.

A case is a dict: stage, optimizer, steps, batch, micro_batch, and optionally model (of `hermes`; else the toy), precision, zero
(more keys of zero_optimization), run (a directory: load the newest checkpoint first, save at the end), save_at (steps at which to
save), poison (step → kind), weights (a file for the final weights, instead of lists in the results).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hermes_dist.config import validate
from hermes_dist.parallel import engine as engine_module
from hermes_dist.parallel.checkpoint import Checkpointer
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.lamb import Lamb
from hermes_dist.parallel.runtime import Runtime, start
from tests.multiproc import toy
from tests.multiproc.hermes import HermesKit


def case_config(case: dict[str, Any]) -> Any:
    return validate(
        {
            "train": {
                "global_batch": case["batch"],
                "micro_batch": case["micro_batch"],
                "precision": case.get("precision", "fp32"),
                "step_limit_s": 60,
                "ema": {"decay": 0.9},
            },
            "optimizer": {
                "name": case["optimizer"],
                "eps": case.get("eps", 1e-3),
                "weight_decay": 0.01,
                "clip_norm": case.get("clip", 0.3),
            },
            "checkpoint": {"background": case.get("background", True), "keep": 3},
            "deepspeed": {"zero_optimization": {"stage": case["stage"], **case.get("zero", {})}},
        }
    )


def run_case(case: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    config = case_config(case)
    if case.get("precision") == "bf16":
        engine_module.has_fast_bf16 = lambda _: True  # emulated: the toy is small enough for it
    kit: Any = HermesKit(case["model"]) if "model" in case else toy
    engine = Engine(kit.make_model(seed=0 if runtime.rank == 0 else 99), config, runtime)
    out: dict[str, Any] = {"loss": [], "norm": [], "skipped": [], "ratios": [], "first_step": 0}
    checkpointer = Checkpointer(Path(case["run"]), config.checkpoint, runtime) if "run" in case else None
    if checkpointer is not None:
        state = checkpointer.load(engine, case.get("resume", "auto"))
        out["first_step"] = state["step"] if state else 0
    for step in range(out["first_step"], case["steps"]):
        samples = kit.make_samples(step, case["batch"])
        local = torch.zeros(1)
        batches = kit.split(samples, runtime.rank, runtime.world_size, case["micro_batch"])
        poison = case.get("poison", {}).get(str(step))
        if poison and runtime.rank == runtime.world_size - 1:
            batches[-1].image[:] = float("nan") if poison == "nan" else float("inf")
        stats = engine.step(batches, kit.make_loss(kit.pair_count(samples), local.add_), lr=case["lr"])
        out["loss"].append(float(runtime.sum(local)))
        out["norm"].append(stats.grad_norm)
        out["skipped"].append(stats.skipped)
        if isinstance(engine.optimizer, Lamb) and engine.optimizer.ratios is not None:
            out["ratios"].append(engine.optimizer.ratios.tolist())
        if checkpointer is not None and step + 1 in case.get("save_at", [case["steps"]]):
            checkpointer.save(engine, {"step": step + 1}, step + 1)
    if checkpointer is not None:
        checkpointer.finish()
    names = engine.partition.trainable_names
    weights, averaged = engine.gather_weights(averaged=False), engine.averaged_weights()
    out["names"] = names
    if "weights" in case:
        if runtime.rank == 0:
            torch.save(weights, case["weights"])
        return out
    out["weights"] = [weights[n].flatten().tolist() for n in names]
    out["ema"] = [averaged[n].flatten().tolist() for n in names]
    out["all_names"] = list(weights)
    return out


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    runtime = start(case_config(cases[0]))
    results = [run_case(case, runtime) for case in cases]
    if runtime.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    runtime.close()


if __name__ == "__main__":
    main()
