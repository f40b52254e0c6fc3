"""Whole weights of a run on the CPU, without a training process: of its newest checkpoint, the best one, or that of a step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.stored import Stored, best_name, list_checkpoints, open_checkpoint, read_extra

NEWEST, BEST = "newest", "best"
_EXPORTED = "weights.safetensors"


@dataclass(frozen=True)
class Weights:
    """Whole tensors by their names in the model's state dict, and what they were read from."""

    tensors: dict[str, Tensor]
    checkpoint: str
    """`step_00002000`, or the name of a safetensors file."""
    chosen: str
    """What was asked for: `newest`, `best` or a step."""

    def __str__(self) -> str:
        return f"{self.checkpoint} ({self.chosen})"


def find_checkpoints(source: Path, checkpoint: str | int = NEWEST) -> list[Stored]:
    """The checkpoints that may be read, the preferred one first.

    Args:
        source: a run directory; or one checkpoint's directory or a safetensors file, of which nothing can be chosen.
        checkpoint: `newest` (all complete ones: where the newest is damaged, the one before it counts; may be none), `best`
            (the one with the highest mean Dice during training) or the number of a step (that very one).

    Raises:
        CheckpointError: there is no such checkpoint; lists those there are, and says which is the best.
    """
    alone = (source / "checkpoint.json").is_file()
    if (alone or source.is_file()) and checkpoint != NEWEST:
        raise CheckpointError(
            f"{source} is one set of weights, of which {str(checkpoint)!r} cannot be chosen; name its run directory"
        )
    stored = [open_checkpoint(source)] if alone else list_checkpoints(source)
    if checkpoint == NEWEST:
        return stored
    best = best_name(source)
    if checkpoint == BEST:
        found, why = [s for s in stored if s.path.name == best], "no checkpoint that is marked as the best"
    else:
        step = str(checkpoint).removeprefix("step_")
        found = [s for s in stored if step.isdecimal() and s.step == int(step)]
        why = f"no checkpoint {str(checkpoint)!r}"
    if found:
        return found
    steps = [f"{s.step} (best)" if s.path.name == best else str(s.step) for s in reversed(stored)]
    marked = "" if any(s.path.name == best for s in stored) else "; none is marked as the best (evaluate.every_steps does that)"
    there = f"checkpoints of the steps {', '.join(steps)}{marked}" if steps else "no complete checkpoints"
    raise CheckpointError(f"{source}: {why}; there are {there}. Expected newest, best, or one of these steps")


def open_weights(source: Path, checkpoint: str | int = NEWEST, *, ema: bool = True) -> Weights:
    """Read whole weights.

    Args:
        source: a run directory (where it has no checkpoint, its `weights.safetensors`), one checkpoint's directory, or a
            safetensors file.
        checkpoint: as in `find_checkpoints`.
        ema: the averaged weights where the run kept them.

    Raises:
        CheckpointError: there is nothing to read, or all of it is damaged; or no such checkpoint.
    """
    chosen = str(checkpoint)
    found = find_checkpoints(source, checkpoint)
    if source.is_file():
        return Weights(load_file(source), source.name, chosen)
    for stored in found:
        bad = stored.damaged_files()
        if not bad:
            return Weights(_assemble(stored, ema=ema), stored.path.name, chosen)
        damage = f"{stored.path / bad[0]} is damaged (size or checksum)"
        if checkpoint != NEWEST:
            raise CheckpointError(f"{damage}, so the weights of {chosen!r} cannot be read; choose another checkpoint")
        print(f"warning: {damage}; trying the previous checkpoint", file=sys.stderr)
    if (source / _EXPORTED).is_file():
        return Weights(load_file(source / _EXPORTED), _EXPORTED, chosen)
    raise CheckpointError(
        f"{source}: no undamaged checkpoint in checkpoints/ and no {_EXPORTED}; train it first, or name another run"
    )


def read_weights(source: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of `open_weights(source)`."""
    return open_weights(source, ema=ema).tensors


def _assemble(stored: Stored, *, ema: bool) -> dict[str, Tensor]:
    reader = stored.reader()
    weights: dict[str, Tensor] = {}
    for name, shape in stored.index["common"]["shapes"].items():
        whole = torch.empty(shape)
        reader.read_into(whole.view(-1), "ema" if ema and reader.has("ema", name) else "param", name, 0)
        weights[name] = whole
    return {**weights, **read_extra(stored, "rank_00000.safetensors", "buffer")}
