"""An engine's state as named pieces, and back: what one rank puts into a checkpoint and takes out of it.

Kinds of pieces: `param` (fp32 masters and frozen parameters), `ema`, and the optimizer's moments `exp_avg`, `exp_avg_sq`. Scalars
(step counts), buffers and the states of random generators go along.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermes_dist.config import differences
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.fragments import Fragment, FragmentReader
from hermes_dist.parallel.partition import FlatBuffer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """One rank's tensors by key, where its pieces lie in them, and what is the same on all ranks."""

    tensors: dict[str, Tensor]
    fragments: list[Fragment]
    common: dict[str, Any]


def take_snapshot(engine: Engine, *, copy: bool) -> Snapshot:
    """This rank's state on the CPU. `copy=False` may alias live tensors: write it before the next step.

    The layout is one flat tensor per kind and buffer, exactly as the optimizer holds it.
    """
    runtime, partition = engine.runtime, engine.partition
    tensors: dict[str, Tensor] = {}
    fragments: list[Fragment] = []

    def add(kind: str, index: int, buffer: FlatBuffer, flat: Tensor) -> None:
        key = f"{kind}/{index}"
        flat = flat.detach().reshape(-1)
        tensors[key] = flat.clone() if copy and flat.device.type == "cpu" else flat.cpu()
        fragments.extend(Fragment(s.name, s.start, s.length, key, s.flat_start) for s in buffer.segments)

    owned = set(map(id, partition.owned(runtime.rank, runtime.world_size)))
    for index, buffer in enumerate(partition.buffers):
        if id(buffer) not in owned:
            continue
        add("param", index, buffer, buffer.master)
        if engine.ema is not None:
            add("ema", index, buffer, engine.ema.averages[index])
        state = engine.optimizer.state.get(buffer.key, {})
        for kind in MOMENTS:
            if kind in state:
                add(kind, index, buffer, state[kind])
    if runtime.rank == 0 or engine.stage == 3:
        for index, buffer in enumerate(partition.frozen, start=len(partition.buffers)):
            add("param", index, buffer, buffer.master)
    if runtime.rank == 0:
        for name, value in persistent_buffers(engine).items():
            tensors[f"buffer/{name}"] = value.detach().cpu().clone()
    for name, value in _random_states(engine).items():
        tensors[f"random/{name}"] = value
    return Snapshot(tensors, fragments, _common(engine))


def persistent_buffers(engine: Engine) -> dict[str, Tensor]:
    """The module's buffers that belong to its state dict."""
    kept = {n for m, module in engine.module.named_modules() for n in _persistent_names(m, module)}
    return {name: b for name, b in engine.module.named_buffers() if name in kept}


def _persistent_names(prefix: str, module: torch.nn.Module) -> list[str]:
    skipped = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    return [f"{prefix}.{n}" if prefix else n for n in module._buffers if n not in skipped]  # pyright: ignore[reportPrivateUsage]


def _common(engine: Engine) -> dict[str, Any]:
    steps = [int(engine.optimizer.state[b.key]["step"]) for b in engine.partition.buffers if engine.optimizer.state.get(b.key)]
    return {
        "optimizer": engine.config.optimizer.name,
        "optimizer_steps": max(steps, default=0),
        "ema_updates": engine.ema.updates if engine.ema is not None else None,
        "engine_steps": engine.steps,
        "skipped_steps": engine.skipped_steps,
        "zero_stage": engine.stage,
        "shapes": {name: list(shape) for name, shape in engine.partition.shapes.items()},
        "trainable": list(engine.partition.trainable_names),
        "config": engine.config.model_dump(mode="json"),
    }


HARMLESS = ("run", "stream", "monitor", "checkpoint", "evaluate")
"""Sections that do not change what a step computes."""


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key: old → new` for each setting of a resolved configuration that can change the curve. Empty without `before`."""
    found = differences(before, now) if before else ()
    return [f"{key}: {json.dumps(old)} → {json.dumps(new)}" for key, old, new in found if key.split(".")[0] not in HARMLESS]


def restore_snapshot(engine: Engine, reader: FragmentReader, common: dict[str, Any], where: str) -> None:
    """Fill the engine from pieces written by any world and stage. Collective.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer; names the first difference.
    """
    check_model(engine, common, where)
    steps = int(common["optimizer_steps"])
    with torch.no_grad():
        for index, buffer in enumerate(engine.partition.buffers):
            _fill(reader, buffer.master, "param", buffer)
            if engine.ema is not None:
                _fill(reader, engine.ema.averages[index], "ema" if common["ema_updates"] is not None else "param", buffer)
            if steps:
                _restore_moments(engine, reader, buffer, steps)
        for buffer in engine.partition.frozen:
            _fill(reader, buffer.master, "param", buffer)
    engine.partition.publish()
    if engine.ema is not None:
        engine.ema.updates = int(common["ema_updates"] or 0)
    engine.steps, engine.skipped_steps = int(common["engine_steps"]), int(common["skipped_steps"])


def _restore_moments(engine: Engine, reader: FragmentReader, buffer: FlatBuffer, steps: int) -> None:
    state = engine.optimizer.state[buffer.key]
    state["step"] = steps if engine.config.optimizer.name == "lamb" else adam_step(steps, buffer.key)
    for kind in MOMENTS:
        flat = torch.zeros_like(buffer.master)
        _fill(reader, flat, kind, buffer)
        state[kind] = flat.view(buffer.key.shape)


def adam_step(steps: int, key: Tensor) -> Tensor:
    """torch's step count of AdamW for the buffer `key`: the fused kernel wants it where the buffer is."""
    return torch.tensor(float(steps), dtype=torch.float32, device=key.device)


def _fill(reader: FragmentReader, flat: Tensor, kind: str, buffer: FlatBuffer) -> None:
    for s in buffer.segments:
        reader.read_into(flat[s.flat_start : s.flat_start + s.length], kind, s.name, s.start)


def check_model(engine: Engine, common: dict[str, Any], where: str) -> None:
    """Compare names, shapes and optimizer. Raises CheckpointError naming the first difference."""
    ours = {name: list(shape) for name, shape in engine.partition.shapes.items()}
    theirs: dict[str, list[int]] = common["shapes"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{where} is of another model: parameter {name!r} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here. Use the run's own config.json, or run.resume=never for a new run"
            )
    if common["optimizer"] != engine.config.optimizer.name:
        raise CheckpointError(
            f"{where} was written with optimizer {common['optimizer']!r}, and this is {engine.config.optimizer.name!r}. "
            f"Set optimizer.name={common['optimizer']}, or run.resume=never"
        )
    added = sorted(set(engine.partition.trainable_names) - set(common["trainable"]))
    if added:
        raise CheckpointError(f"{where} holds {added[0]!r} (and {len(added) - 1} more) frozen, and they are trainable here")


def _random_states(engine: Engine) -> dict[str, Tensor]:
    kind, keys, position, *gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - third parties may still draw from it
    del kind
    python = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([float(position), float(gauss[0]), float(gauss[1])], dtype=torch.float64),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "python_gauss": torch.tensor([] if python[2] is None else [python[2]], dtype=torch.float64),
    }
    if engine.runtime.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.runtime.device)
    return states


def restore_random(engine: Engine, states: dict[str, Tensor]) -> None:
    """Set the generators of this process to what `take_snapshot` stored."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    python_gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(int(v) for v in states["python"].tolist()), python_gauss[0] if python_gauss else None))
    if "cuda" in states and engine.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], engine.runtime.device)
