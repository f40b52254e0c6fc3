"""Raw scans in, masks on their own grid out.

Examples:
  python launch/predict.py --run runs/demo --input scan.nii.gz --modality CT --tasks liver,phantom_ct/tumour --out masks
  python launch/predict.py --run runs/demo --input folder_of_scans --modality CT --tasks all --out masks --multilabel
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from data_tools.mask_writer import check_targets, target_of, write_multilabel, write_separate
from data_tools.scans import find_scans, read_scan
from hermes_dist.errors import HermesError, exit_on_error
from hermes_dist.train.memory_errors import named_memory_errors
from hermes_dist.train.options import require_folder, to_count, to_device, use_cores
from hermes_dist.train.predict import THRESHOLD, Target, TrainedRun, load_run, predict_scan, resolve_targets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory of launch/train.py or launch/import_published.py")
    parser.add_argument("--checkpoint", default="newest", help="newest (default), best or a step")
    parser.add_argument("--input", type=Path, required=True, help="a scan (nii, nrrd, mha), a DICOM series, or a folder of them")
    parser.add_argument("--modality", required=True, help="as trained, e.g. CT, T1, PET")
    parser.add_argument("--tasks", required=True, help="comma-separated classes, dataset/class names, or all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks")
    parser.add_argument("--multilabel", action="store_true", help="one label map instead of one file per task")
    parser.add_argument("--device", type=to_device, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--threads", type=to_count, help="CPU threads (default: all cores)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. evaluate.overlap=0.75")
    return parser.parse_intermixed_args()


def predict_one(run: TrainedRun, path: Path, name: str, targets: list[Target], args: argparse.Namespace) -> list[Path]:
    """Read, predict and write one scan; returns the files."""
    scan = read_scan(path)
    found = predict_scan(run, scan.values(), scan.grid, modality=args.modality, targets=targets)
    masks = ((answer.target.name, answer.mask_zyx) for answer in found)
    stated = {"scan": str(path), "modality": args.modality, "run": str(args.run), **run.about, "threshold": THRESHOLD}
    about = stated | {"findings": [finding.message for finding in scan.findings]}
    write = write_multilabel if args.multilabel else write_separate
    return write(target_of(args.out, name, multilabel=args.multilabel), masks, scan.grid, like=path, about=about)


def main() -> int:
    args = arguments()
    failed = 0
    with exit_on_error():
        scans = find_scans(args.input)
        check_targets(args.out, scans, source=args.input, multilabel=args.multilabel)
        require_folder(args.out)
        use_cores(args.threads)
        run = load_run(args.run, args.device, args.overrides, checkpoint=args.checkpoint)
        print(run, flush=True)
        targets = resolve_targets(run.tasks, [t.strip() for t in args.tasks.split(",") if t.strip()], args.modality)
        for name, path in scans.items():
            started = time.perf_counter()
            try:
                with named_memory_errors(str(path)):
                    files = predict_one(run, path, name, targets, args)
            except HermesError as error:
                failed += 1
                print(f"error: {name}: {error}", file=sys.stderr, flush=True)
                continue
            print(f"{name}: {len(targets)} tasks in {time.perf_counter() - started:.1f} s → {files[-1].parent}", flush=True)
        if failed and len(scans) > 1:
            print(f"{failed} of {len(scans)} scans failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
