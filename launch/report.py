"""Write RUN/report.html, one self-contained page. Example:  python launch/report.py --run runs/demo --png overview.png"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hermes_dist.errors import exit_on_error
from hermes_dist.train.report import write_overview, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory, as made by launch/train.py")
    parser.add_argument("--split", default="test", help="which evaluation to show (default: test)")
    parser.add_argument("--png", type=Path, help="also write one overview picture to this file")
    args = parser.parse_args()
    with exit_on_error():
        print(f"wrote {write_report(args.run, args.split)}")
        if args.png:
            print(f"wrote {write_overview(args.run, args.png, args.split)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
