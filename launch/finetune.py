"""Go on from a trained run with new data: transfer (all weights), or incremental (frozen backbone, new task tokens).

Examples:
  deepspeed launch/finetune.py --from runs/base --store stores/pancreas --name pancreas train.max_steps=2000 optimizer.lr=5e-4
  python launch/finetune.py --from runs/base --store stores/pancreas --name base_plus --mode incremental train.max_steps=500
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hermes_dist.errors import exit_on_error
from hermes_dist.parallel import runtime
from hermes_dist.train.finetune import finetune_config
from hermes_dist.train.trainer import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, required=True, dest="source", help="run directory whose weights are the start")
    parser.add_argument("--checkpoint", default="newest", help="newest (default), best or a step: which of its checkpoints")
    parser.add_argument("--store", action="append", required=True, dest="stores", help="shard store with new data (repeatable)")
    parser.add_argument("--name", required=True, help="name of the new run, beside the old one")
    parser.add_argument("--mode", choices=("transfer", "incremental"), default="transfer")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="JSON or text, e.g. train.max_steps=1000")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    args = parser.parse_intermixed_args()
    with exit_on_error():
        config = finetune_config(
            args.source,
            args.mode,
            stores=args.stores,
            name=args.name,
            checkpoint=args.checkpoint,
            overrides=args.overrides,
        )
        session = runtime.start(config)
        try:
            result = train(config, session)
        finally:
            session.close()
        print(f"wrote {config.run_dir}")
    return runtime.EXIT_REQUEUE if result.stopped_early else 0


if __name__ == "__main__":
    sys.exit(main())
