"""The table of scores, as HTML and for the terminal: per dataset and class, with intervals, missed structures, and the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
COLUMNS = ("class", "n (with it)", "Dice", "", "95 % interval", "NSD", "HD95 mm", "missed", "false alarms")


def scores_section(result: Json) -> str:
    """The section of an `evaluation/<split>.json`; a hint how to evaluate where there is none."""
    if not result:
        hint = "python launch/evaluate.py --run RUN --split test"
        return f"<section><h2>Scores</h2><p>Not evaluated yet: <code>{hint}</code></p></section>"
    rows: list[str] = []
    for dataset in result["per_dataset"]:
        rows.append(_row(dataset, f"<b>{escape(dataset['dataset'])}</b>", str(dataset["n"]), "dataset"))
        for row in (r for r in result["per_class"] if r["dataset"] == dataset["dataset"]):
            rows.append(_row(row, escape(row["task"]), f"{row['n']} ({row['n_with_reference']})", ""))
    rows.append(_row(result["mean"], "<b>mean over classes</b>", str(result["mean"]["n_cases"]), "dataset"))
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    text = "".join(f'<p class="note">{note}</p>' for note in _notes(result))
    return f'<section><h2>Scores</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{text}</section>'


def show(result: Json, console: Console) -> None:
    """Print the table, the policy, and what could not be scored."""
    table = Table("dataset", "class", title=f"{result['split']} split, {result['n_cases']} whole scans")
    for name in ("n", "Dice", "95 % interval", "NSD", "HD95 mm", "missed", "false alarms"):
        table.add_column(name, justify="right")
    total = result["mean"]
    mean = {**total, "dataset": "mean", "task": f"{total['n_classes']} classes", "n": total["n_cases"]}
    rows: list[Json] = [*result["per_class"], mean]
    for row in rows:
        cells = [row["dataset"], row["task"], str(row["n"]), score(row["dice"]), interval(row["dice_ci"]), score(row["nsd"])]
        table.add_row(*cells, score(row["hd95_mm"], "{:.1f}"), str(row["missed"]), str(row["false_alarms"]))
    console.print(table)
    console.print(about_weights(result))
    policy = result["policy"]
    console.print(
        f"empty references: {policy['empty_reference']} ({policy['meaning']}); cases by grid: {policy['cases_by_grid']}"
    )
    for failure in result["failed"]:
        console.print(f"not scored: {failure['dataset']}/{failure['case_id']}: {failure['reason']}")


def about_weights(result: Json) -> str:
    """Which checkpoint a table is about. Results of earlier versions name the weights only."""
    checkpoint = f"{result['checkpoint']} ({result['chosen']}), " if result.get("checkpoint") else ""
    return f"checkpoint: {checkpoint}weights {result['weights']}"


def score(value: float | None, form: str = "{:.3f}") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else form.format(value)


def interval(pair: Sequence[float] | None) -> str:
    """`low – high`, or nothing."""
    return f"{pair[0]:.3f} – {pair[1]:.3f}" if pair else ""


def _notes(result: Json) -> list[str]:
    policy = {key: escape(str(value)) for key, value in result["policy"].items()}
    three = ", ".join(f"{escape(k)} {score(v)}" for k, v in result["mean"]["dice_by_policy"].items())
    grids = escape(json.dumps(result["policy"].get("cases_by_grid", {})))
    notes = [
        f"{escape(about_weights(result).capitalize())}.",
        f"Empty references: <b>{policy['empty_reference']}</b> ({policy['meaning']}). Mean Dice under each policy: {three}.",
        f"NSD: {policy['nsd']}. HD95: {policy['hd95_mm']}. Mean: {policy['mean']}. Intervals: {policy['ci']}.",
        f"Whole scans of the {escape(result['split'])} split, never cropped with the reference; cases by grid: {grids}.",
    ]
    failed = [f"{f['dataset']}/{f['case_id']}: {f['reason']}" for f in result.get("failed", [])]
    return [*notes, "<b>Not scored:</b> " + escape("; ".join(failed))] if failed else notes


def _row(row: Json, name: str, n: str, style: str) -> str:
    dice = row["dice"]
    bar = "" if dice is None else f'<i class="bar"><i style="width:{100 * dice:.1f}%"></i></i>'
    cells = [n, score(dice), bar, interval(row["dice_ci"]), score(row["nsd"]), score(row["hd95_mm"], "{:.1f}")]
    cells += [str(row.get(key, "")) for key in ("missed", "false_alarms")]
    return f'<tr class="{style}"><td>{name}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
