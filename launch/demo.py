"""The main job end to end: data → shards → training on two ranks → evaluation → a mask for one raw scan → a report.

Without --data, synthetic phantoms are made first. Example:  python launch/demo.py --seed 11
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


def call(*command: object, title: str) -> None:
    """Run one command of the job, shown as a person would type it; its failure ends the demo with its exit code."""
    started, line = time.perf_counter(), [str(part) for part in command]
    print(f"\n── {title}\n$ {' '.join(line)}", flush=True)
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    code = subprocess.run(line, cwd=ROOT, env=env).returncode
    if code:
        sys.exit(code)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def first_test_scan(collection: Path) -> tuple[Path, str, str]:
    """One raw scan of the first dataset: (image file, modality, its classes as `dataset/class,…`)."""
    from data_tools.collection import read_collection_file

    entry = read_collection_file(collection).datasets[0]
    case = entry.test_cases()[0]
    return case.image_path, entry.modality, ",".join(f"{entry.name}/{name}" for name in entry.class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7, help="moves the phantoms, the initialisation and the order")
    parser.add_argument("--data", type=Path, help="folder with a collection.json of real scans, instead of phantoms")
    args = parser.parse_args()
    data = args.data or ROOT / "demo_data" / f"seed{args.seed}"
    run, store = ROOT / "runs" / "demo", ROOT / "stores" / (f"demo-{args.data.name}" if args.data else f"demo-seed{args.seed}")
    started = time.perf_counter()
    if run.exists():
        print(f"removing the previous demo run {run.relative_to(ROOT)}")
        shutil.rmtree(run)
    if not args.data:
        call("hermes-shard", "phantom", "--out", data, "--seed", args.seed, title="four synthetic datasets, partial labels")
    call("hermes-shard", "convert", "--collection", data / "collection.json", "--out", store, "--workers", 2, title="shards")
    overrides = [f'data.stores=["{store}"]', f"run.seed={args.seed}", "run.output_dir=runs"]
    train = ["launch/train.py", "--config", "demo.json", *overrides]
    call("deepspeed", "--num_accelerators", 2, *train, title="training on two ranks, ZeRO")
    call(sys.executable, "launch/evaluate.py", "--run", run, "--split", "test", title="evaluation on whole scans")
    scan, modality, tasks = first_test_scan(data / "collection.json")
    predict = [
        "launch/predict.py",
        "--run",
        run,
        "--input",
        scan,
        "--modality",
        modality,
        "--tasks",
        tasks,
        "--out",
        run / "masks",
    ]
    call(sys.executable, *predict, title="a mask for one raw scan, on its own grid")
    call(sys.executable, "launch/report.py", "--run", run, title="report")
    dice = json.loads((run / "evaluation" / "test.json").read_text())["mean"]["dice"]
    print(f"\nmean Dice {dice:.3f} in {time.perf_counter() - started:.0f} s; open {(run / 'report.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
