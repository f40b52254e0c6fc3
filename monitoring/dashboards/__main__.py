"""Write the dashboards as JSON: `python -m monitoring.dashboards`. A test fails if code and JSON disagree."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.dashboards import data_path, distributed, per_dataset, run_overview, scaling
from monitoring.dashboards.panels import Board, build

FOLDER = Path(__file__).resolve().parent.parent / "grafana" / "dashboards"
BOARDS: dict[str, Board] = {
    "run_overview": run_overview.BOARD,
    "data_path": data_path.BOARD,
    "per_dataset": per_dataset.BOARD,
    "distributed": distributed.BOARD,
    "scaling": scaling.BOARD,
}


def render(board: Board) -> str:
    """The JSON text of a dashboard; panel ids in order, so that links to panels stay valid."""
    data = json.loads(JSONEncoder(sort_keys=True).encode(build(board)))
    for index, panel in enumerate(data["panels"], start=1):
        panel["id"] = index
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, board in BOARDS.items():
        path = FOLDER / f"{name}.json"
        path.write_text(render(board))
        print(f"wrote {path.relative_to(FOLDER.parent.parent.parent)} ({len(board.panels)} panels)")


if __name__ == "__main__":
    main()
