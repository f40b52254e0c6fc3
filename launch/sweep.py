"""A grid of trainings, their results, fits and report. Run the same command again to go on after a stop.

Example:  python launch/sweep.py --config configs/sweeps/scaling.json data.stores='["stores/demo"]'
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path

from sweep_backends import BACKENDS, LiveTable, write_report, write_results

from hermes_dist.config import find_config
from hermes_dist.errors import ConfigError, exit_on_error
from hermes_dist.scaling.sweep import SweepConfig, members, read_sweep, split_override
from hermes_dist.scaling.sweep_report import report
from hermes_dist.scaling.sweep_results import read_state, result_row

TRAIN = Path(__file__).resolve().with_name("train.py")
CONFIGS = TRAIN.parent.parent / "configs"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name in configs/sweeps/")
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="default: as the file says")
    parser.add_argument("--member", type=int, help="run this one only (a Slurm array passes its task id)")
    parser.add_argument("--list", action="store_true", help="list the members and stop")
    parser.add_argument("--report-only", action="store_true", help="results and report of what is there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set in every member; no key of grid or points")
    return parser.parse_intermixed_args()


def with_overrides(sweep: SweepConfig, pairs: list[str]) -> SweepConfig:
    changed = dict(sweep.overrides)
    for pair in pairs:
        key, text = split_override(sweep, pair)
        try:
            changed[key] = json.loads(text)
        except json.JSONDecodeError:
            changed[key] = text
    return sweep.model_copy(update={"overrides": changed})


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running members are stopped, and resume next time
    with exit_on_error():
        sweep = with_overrides(read_sweep(find_config(args.config, CONFIGS / "sweeps")), args.overrides)
        chosen = everyone = members(sweep, CONFIGS)
        if args.list:
            print("\n".join(f"{m.index:>4}  {m.name}" for m in everyone))
            return 0
        if args.member is not None:
            if not 0 <= args.member < len(everyone):
                raise ConfigError(f"--member {args.member}: the sweep has members 0 to {len(everyone) - 1}")
            chosen = [everyone[args.member]]
        if not args.report_only:
            table, backend = LiveTable(sweep, chosen), args.backend or sweep.backend
            try:
                BACKENDS[backend if args.member is None else "local"](sweep, chosen, TRAIN, table.update)
            finally:
                table.close()
        states = {member.name: read_state(member) for member in everyone}
        rows = [result_row(member, states[member.name], sweep) for member in everyone]
        folder = Path(sweep.output_dir) / sweep.name
        write_results(folder / "results.parquet", rows)
        files = write_report(folder, report(sweep, everyone, rows, shlex.join(["python", *sys.argv])))
        print("wrote", folder / "results.parquet", *files)
    return 0 if all(states[member.name].state in ("done", "diverged") for member in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
