"""Train. Example:  deepspeed launch/train.py --config large.json train.max_steps=1000

Runs under deepspeed, torchrun, srun, or as plain `python launch/train.py` (one process).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hermes_dist.config import find_config, load_config
from hermes_dist.errors import exit_on_error
from hermes_dist.parallel import runtime
from hermes_dist.train.trainer import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name in configs/ (large.json)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="JSON or text, e.g. train.max_steps=1000")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it; LOCAL_RANK is what counts
    args = parser.parse_intermixed_args()
    with exit_on_error():
        config = load_config(find_config(args.config, CONFIGS), args.overrides)
        session = runtime.start(config)
        try:
            result = train(config, session)
        finally:
            session.close()
    return runtime.EXIT_REQUEUE if result.stopped_early else 0


if __name__ == "__main__":
    sys.exit(main())
