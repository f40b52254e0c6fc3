"""One side of a model bench: a training step in a process of its own. Called by test_model_speed.py with a JSON of options.

`side` = `baseline` (tests/bench/model_baseline.py) or an activation checkpointing mode of Hermes-R. Prints one JSON line:
cpu_s, wall_s of the fastest step; peak_mib, resident memory above that after the imports; activation_mib, resident memory of the
step above that with the model and its gradients in place; tensor_mib, the most that tensors of one more step held at once; and
loss and grad_norm, for comparing the numbers.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch
from live_tensors import LiveTensors
from model_baseline import BaselineHermesR, baseline_pair_losses
from torch import Tensor, nn

from hermes_dist.models.checkpointing import apply_activation_checkpointing
from hermes_dist.models.published import from_state_dict
from hermes_dist.seg.losses import pair_losses


def resident_mib(field: str) -> float:
    """`VmRSS` now, or `VmHWM` since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Start a new high-water mark of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def loss_of(model: nn.Module, baseline: bool, image: Tensor, task_ids: Tensor, targets: Tensor) -> Tensor:
    """Forward pass and loss, as the engine calls them: the logits outlive this function only where autograd keeps them."""
    modality_ids = torch.zeros(len(image), dtype=torch.int64)
    if baseline:
        logits, modality = model(image, task_ids, modality_ids)
        bce, overlap = baseline_pair_losses(logits, targets)
    else:
        logits, _, modality = model(image, task_ids, modality_ids)
        bce, overlap = pair_losses(logits, targets, overlap="tversky")
    real = task_ids >= 0
    return (bce + overlap)[real].mean() + 0.01 * nn.functional.cross_entropy(modality, modality_ids)


def step(model: nn.Module, baseline: bool, image: Tensor, task_ids: Tensor, targets: Tensor) -> Tensor:
    """Forward, loss and backward; returns the loss."""
    loss = loss_of(model, baseline, image, task_ids, targets)
    loss.backward()
    return loss.detach()


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    baseline = options["side"] == "baseline"
    start_mib = resident_mib("VmRSS")
    torch.manual_seed(0)
    model: nn.Module = BaselineHermesR(options["base"])
    if not baseline:
        model = from_state_dict(model.state_dict())
        apply_activation_checkpointing(model, options["side"])
        gc.collect()
    side = options["side_vox"]
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 1, side, side, side, generator=generator)
    task_ids = torch.tensor([[*range(options["columns"]), -1]])
    targets = torch.rand(1, task_ids.shape[1], side, side, side, generator=generator) > 0.7
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model_mib = resident_mib("VmRSS")
    reset_peak()
    best = (float("inf"), float("inf"))
    loss = torch.zeros(())
    for _ in range(options["repeats"]):
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step(model, baseline, image, task_ids, targets)
        best = min(best, (time.process_time() - cpu, time.perf_counter() - wall))
    grad_norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    memory = {"peak_mib": resident_mib("VmHWM") - start_mib, "activation_mib": resident_mib("VmHWM") - model_mib}
    weights = list(model.parameters())
    live = LiveTensors([image, targets, *weights, *(p.grad for p in weights if p.grad is not None)])
    with live:
        step(model, baseline, image, task_ids, targets)
    row = {
        "cpu_s": best[0],
        "wall_s": best[1],
        **memory,
        "tensor_mib": live.peak_bytes / 2**20,
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
