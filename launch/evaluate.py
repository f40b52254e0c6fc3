"""Score a run on whole scans: Dice, NSD, HD95 per dataset and class → RUN/evaluation/SPLIT.json.

Examples:
  python launch/evaluate.py --run runs/demo --split test
  python launch/evaluate.py --run runs/demo --split val --loss 128
  python launch/evaluate.py --run runs/demo --raw demo_data/seed7/collection.json
  torchrun --nproc-per-node 8 -- launch/evaluate.py --run runs/large evaluate.overlap=0.75
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from data_tools.references import RawReferences
from hermes_dist.errors import exit_on_error
from hermes_dist.parallel import runtime
from hermes_dist.train.evaluate import Job, evaluate, others_before
from hermes_dist.train.held_out import held_out_loss, write_held_out
from hermes_dist.train.options import to_count, to_device, use_cores
from hermes_dist.train.predict import load_run
from hermes_dist.train.report_scores import show
from hermes_dist.train.run_directory import open_stores
from hermes_dist.train.transfer import check_preprocessing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory of launch/train.py or launch/import_published.py")
    parser.add_argument("--checkpoint", default="newest", help="newest (default), best or a step")
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    parser.add_argument("--raw", type=Path, help="collection file: score on the scans' own grids against the raw labels")
    parser.add_argument("--loss", type=to_count, metavar="N", help="only the loss, over N patches → evaluation/SPLIT_loss.json")
    parser.add_argument("--device", type=to_device, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--threads", type=to_count, help="CPU threads (default: all cores)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help='e.g. data.stores=["URL"]')
    return parser.parse_intermixed_args()


def main() -> int:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    with exit_on_error():
        run = load_run(args.run, args.device, args.overrides, checkpoint=args.checkpoint)
        use_cores(args.threads)
        session = runtime.start(run.config) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        stores, _, preprocessing = open_stores(run.config)
        check_preprocessing(args.run, preprocessing.model_dump(mode="json"))
        if args.loss:
            result = held_out_loss(run, stores, args.split, args.loss)
            print(f"{run}: loss {result['loss']:.4f} over {result['samples']} patches; wrote {write_held_out(run, result)}")
            for name, reason in result["unreadable"].items():
                print(f"replaced by other cases: {name}: {reason}", file=sys.stderr)
            return 0
        references = RawReferences(args.raw) if args.raw else None
        about = (args.run, run.config, stores, run.tasks, args.split, run.weights_digest, references)
        source = references.digest if references else ""
        job = Job(*about, checkpoint=run.checkpoint, chosen=run.chosen, references_digest=source)
        earlier = others_before(job)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
            line = bar.add_task("scans", total=None)
            result = evaluate(run.model, job, session, progress=lambda i, n, _: bar.update(line, completed=i, total=n))
        if session:
            session.close()
        if result is None:  # another rank than the first, which has a result unless it was asked to stop
            return runtime.EXIT_REQUEUE if session and session.rank == 0 else 0
        show(result, console)
        console.print(f"wrote {job.path}" + (f", in place of the scores of {earlier}" if earlier else ""), soft_wrap=True)
        return 1 if result["failed"] else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
