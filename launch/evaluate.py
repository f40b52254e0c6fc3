"""Score a run on whole scans: Dice, NSD, HD95 per dataset and class → RUN/evaluation/SPLIT.json.

Examples:
  python launch/evaluate.py --run runs/demo --split test
  torchrun --nproc-per-node 8 -- launch/evaluate.py --run runs/large evaluate.overlap=0.75
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hermes_dist.errors import exit_on_error
from hermes_dist.parallel import runtime
from hermes_dist.train.evaluate import Job, evaluate
from hermes_dist.train.predict import load_run, use_cores
from hermes_dist.train.report_scores import interval, score
from hermes_dist.train.run_directory import open_stores


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory of launch/train.py or launch/import_published.py")
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help='e.g. data.stores=["URL"]')
    return parser.parse_intermixed_args()


def show(result: dict[str, Any], console: Console) -> None:
    """The table, the policy, and what could not be scored."""
    table = Table("dataset", "class", title=f"{result['split']} split, {result['n_cases']} whole scans")
    for name in ("n", "Dice", "95 % interval", "NSD", "HD95 mm", "missed", "false alarms"):
        table.add_column(name, justify="right")
    total = result["mean"]
    mean = {**total, "dataset": "mean", "task": f"{total['n_classes']} classes", "n": total["n_cases"]}
    rows: list[dict[str, Any]] = [*result["per_class"], mean]
    for row in rows:
        cells = [row["dataset"], row["task"], str(row["n"]), score(row["dice"]), interval(row["dice_ci"]), score(row["nsd"])]
        table.add_row(*cells, score(row["hd95_mm"], "{:.1f}"), str(row["missed"]), str(row["false_alarms"]))
    console.print(table)
    console.print(f"empty references: {result['policy']['empty_reference']} ({result['policy']['meaning']})")
    for failure in result["failed"]:
        console.print(f"not scored: {failure['dataset']}/{failure['case_id']}: {failure['reason']}")


def main() -> int:
    args = arguments()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with exit_on_error():
        run = load_run(args.run, torch.device(args.device) if args.device else None, args.overrides)
        use_cores(args.threads)
        session = runtime.start(run.config) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        stores, _, _ = open_stores(run.config)
        job = Job(args.run, run.config, stores, run.tasks, args.split, run.weights_digest)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
            line = bar.add_task("scans", total=None)
            result = evaluate(run.model, job, session, progress=lambda i, n, _: bar.update(line, completed=i, total=n))
        if session:
            session.close()
        if result is None:
            return 0
        show(result, console)
        console.print(f"wrote {job.out_dir / (args.split + '.json')}")
        return 1 if result["failed"] else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
