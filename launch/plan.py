"""What a training needs and gives, before it runs: memory, speed, data rate, time and cost.

Example:  python launch/plan.py --config large.json --gpus 64 --device H100 --tasks 71 --modalities 5
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console

from hermes_dist.config import find_config, load_config
from hermes_dist.errors import UsageError, exit_on_error
from hermes_dist.scaling.communication import Cluster
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.devices import DEVICES, LINKS, find_device
from hermes_dist.scaling.plan_text import print_plan, print_simulation
from hermes_dist.scaling.planning import Assumptions, make_plan

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RATES = ("utilisation", "cpu_s", "price", "simulate_storage")
POSITIVE = ("gpus", "gpus_per_node", "tasks", "columns", "modalities", "cases", "workers", "epochs", *RATES)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name in configs/ (large.json)")
    parser.add_argument("--gpus", type=int, default=8, help="devices in total")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--device", default="H100", help=", ".join(DEVICES))
    parser.add_argument("--link", default="IB-NDR", choices=sorted(LINKS), help="link of a node to the others")
    parser.add_argument("--tasks", type=int, default=71, help="tasks of the collection (the paper: 71)")
    parser.add_argument("--columns", type=int, default=15, help="tasks of one sample")
    parser.add_argument("--modalities", type=int, default=5, help="modalities of the collection")
    parser.add_argument(
        "--utilisation", type=float, default=Assumptions.utilisation, help="share of the peak that one device reaches"
    )
    parser.add_argument(
        "--cpu-s", type=float, default=Assumptions.cpu_s_per_sample, help="CPU seconds per 128³ sample (make bench)"
    )
    parser.add_argument("--price", type=float, help="US dollars per device and hour instead of the table's")
    parser.add_argument(
        "--simulate-storage", type=float, metavar="GB/s", help="also simulate the data path with this much storage"
    )
    parser.add_argument("--epochs", type=float, help="train this many times over --cases instead of train.max_steps")
    parser.add_argument(
        "--cases", type=int, default=2438, help="cases of the collection: one sample each an epoch (the paper: 2,438)"
    )
    parser.add_argument("--workers", type=int, help="data workers per rank, for the simulation (default: stream.workers)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    with exit_on_error():
        for name in POSITIVE:
            free = name == "price" and args.price == 0
            if (value := getattr(args, name)) is not None and not 0 < value < math.inf and not free:  # nan is neither
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected more than 0, and finite")
        config = load_config(find_config(args.config, CONFIGS), args.overrides)
        if args.epochs:
            steps = max(1, math.ceil(args.epochs * args.cases / config.train.global_batch))
            config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps})})
        device = find_device(args.device, args.price)
        cluster = Cluster(args.gpus_per_node, device.link_bytes_per_s, LINKS[args.link])
        request = Request(config.data.patch_vox_zyx, args.columns, args.tasks, args.modalities)
        assume = Assumptions(utilisation=args.utilisation, cpu_s_per_sample=args.cpu_s)
        plan = make_plan(config, request, device, cluster, args.gpus, assume)
        console = Console(width=max(Console().width, 120))
        print_plan(console, plan, config, device, cluster, assume)
        if args.simulate_storage and plan.best:
            workers = args.workers or max(1, config.stream.workers)
            print_simulation(console, plan, config, assume, workers, args.simulate_storage * 1e9)


if __name__ == "__main__":
    main()
