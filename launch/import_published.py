"""A released Hermes checkpoint as a run directory that evaluate, predict and finetune accept.

Reads weights only (no code in the file is run). Writes config.json, tasks.json, preprocessing.json and weights.safetensors.

Example:
  python launch/import_published.py latest.pth --out runs/hermes_r
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from safetensors.torch import save_file

from hermes_dist.errors import UsageError, exit_on_error
from hermes_dist.models.release import paper_tasks, read_checkpoint, release_config, release_weights
from hermes_dist.volume.preprocess import Preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="latest.pth or best.pth, or a bare state dict")
    parser.add_argument("--out", type=Path, required=True, help="run directory to write; must not exist")
    args = parser.parse_args()
    with exit_on_error():
        import_checkpoint(args.checkpoint, args.out)


def import_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write the run directory as a whole: it appears complete or not at all.

    Preprocessing is the default, as in the stores of `hermes-shard convert`. It is the paper's, which clips CT at -990 HU;
    the published code says -991. One HU, in air alone, is 0.004 of a standard deviation of 250 HU: far below noise.
    """
    if out.exists():
        raise UsageError(f"{out} exists; name a run directory that does not")
    tasks = paper_tasks()
    state = read_checkpoint(checkpoint)
    config = release_config(state, out)
    weights = release_weights(state, config, tasks)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    texts = {
        "config.json": config.model_dump_json(indent=1),
        "tasks.json": json.dumps(tasks.to_json(), indent=1),
        "preprocessing.json": Preprocessing().model_dump_json(indent=1),
    }
    for name, text in texts.items():
        (temporary / name).write_text(text)
    save_file(weights, temporary / "weights.safetensors", metadata={"source": checkpoint.name})
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    temporary.rename(out)
    parameters = sum(w.numel() for w in weights.values())
    print(f"{out}: {config.model.backbone}, {len(weights)} tensors, {parameters:,} parameters, {tasks.n_tasks} tasks")


if __name__ == "__main__":
    main()
