"""`report.html`: one self-contained page about a run, for reading, mailing and archiving.

It only reads what the run directory holds (config.json, environment.json, tasks.json, metrics.jsonl, evaluation/): no model, no
data, no network, no script. What is missing is said or left out, so a report can be made at any time, also of a run that goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hermes_dist.errors import ConfigError
from hermes_dist.telemetry.rows import data_stall_s
from hermes_dist.train.evaluate_slices import Slice, read_slice
from hermes_dist.train.report_curves import Series, binned, line_chart
from hermes_dist.train.report_pictures import colour, data_uri, overlay_png, overview_png
from hermes_dist.train.report_scores import interval, score, scores_section
from hermes_dist.train.report_style import STYLE

Json = dict[str, Any]


class RunFiles:
    """What a run directory holds, read leniently: an unfinished last line of a log is skipped.

    Raises:
        ConfigError: the directory has no readable config.json, so it is not a run.
    """

    def __init__(self, run_dir: Path, split: str = "test") -> None:
        self.run_dir = run_dir
        self.config = _json(run_dir / "config.json")
        if not self.config:
            raise ConfigError(f"{run_dir} is not a run directory: {run_dir / 'config.json'} is missing or unreadable")
        self.environment = _json(run_dir / "environment.json")
        self.tasks = _json(run_dir / "tasks.json")
        self.steps = {row["step"]: row for row in _lines(run_dir / "metrics.jsonl") if "step" in row}
        self.history = {row["step"]: row for row in _lines(run_dir / "evaluation" / "history.jsonl") if "step" in row}
        self.result = _json(run_dir / "evaluation" / f"{split}.json")
        self.slices = sorted((run_dir / "evaluation" / f"{split}.slices").glob("*.npz"))

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one key of metrics.jsonl; rows without it are left out."""
        rows = [(float(s), float(r[key])) for s, r in sorted(self.steps.items()) if isinstance(r.get(key), int | float)]
        return [r[0] for r in rows], [r[1] for r in rows]


def write_report(run_dir: Path, split: str = "test") -> Path:
    """Write `RUN/report.html` atomically; returns its path. Raises ConfigError if `run_dir` is not a run directory."""
    files = RunFiles(run_dir, split)
    name = escape(str(files.config.get("run", {}).get("name", run_dir.name)))
    body = [_header(files, name), scores_section(files.result), _pictures(files), _curves(files), _details(files, split)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    return _write(run_dir / "report.html", page.encode())


def write_overview(run_dir: Path, path: Path, split: str = "test") -> Path:
    """Write one PNG that shows the run: a test scan of each dataset (at most four), the loss, and Dice per class."""
    files = RunFiles(run_dir, split)
    chosen = [(dataset, read_slice(picked[0][1])) for dataset, picked in _chosen(files).items()][:4]
    png = overview_png(chosen, files.result, binned(*files.column("loss")))
    path.parent.mkdir(parents=True, exist_ok=True)
    return _write(path, png)


def _header(files: RunFiles, name: str) -> str:
    datasets = files.tasks.get("datasets", [])
    classes = sum(len(d["classes"]) for d in datasets)
    model = files.config.get("model", {})
    what = f"{model.get('method', '')} {model.get('backbone', '')}, base {model.get('base_channels', '?')}"
    mean = files.result.get("mean", {})
    steps, seconds = files.column("step_s")
    rate = files.column("samples_per_s")[1]
    wait = sum(data_stall_s(row) for row in files.steps.values())
    cards = [
        ("mean Dice", score(mean.get("dice")), interval(mean.get("dice_ci"))),
        ("mean NSD", score(mean.get("nsd")), interval(mean.get("nsd_ci"))),
        ("mean HD95", score(mean.get("hd95_mm"), "{:.1f} mm"), f"{mean.get('missed', '–')} missed structures"),
        ("trained", f"{int(steps[-1]) + 1:,} steps" if steps else "–", f"{sum(seconds) / 60:.1f} min" if steps else ""),
        ("throughput", score(_median(rate), "{:.2f} samples/s"), f"waits for data {wait / sum(seconds):.1%}" if steps else ""),
    ]
    tiles = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span><i>{escape(s)}</i></div>' for k, v, s in cards)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    line = f"{escape(what)} · {len(datasets)} datasets, {classes} annotated classes · report of {when}"
    return f'<header><h1>{name}</h1><p class="lead">{line}</p><div class="cards">{tiles}</div></header>'


def _chosen(files: RunFiles) -> dict[str, list[tuple[str, Path]]]:
    """Per dataset the median case and the worst one, with a title each (one case if there is only one)."""
    dice: dict[str, list[float]] = {}
    for row in files.result.get("cases", []):
        empty = row["reference_vox"] == 0 and row["prediction_vox"] == 0
        dice.setdefault(f"{row['dataset']}/{row['case_id']}", []).append(1.0 if empty else row["dice"] or 0.0)
    ranked: dict[str, list[tuple[float, str, Path]]] = {}
    for path in files.slices:
        case = read_slice(path).case
        if case in dice:
            ranked.setdefault(case.partition("/")[0], []).append((sum(dice[case]) / len(dice[case]), case, path))
    result: dict[str, list[tuple[str, Path]]] = {}
    for dataset, entries in sorted(ranked.items()):
        entries.sort()
        middle = entries[len(entries) // 2]
        picked = [("median", middle)] + ([("worst", entries[0])] if entries[0] != middle else [])
        result[dataset] = [(f"{kind} case {case}, mean Dice {score:.3f}", path) for kind, (score, case, path) in picked]
    return result


def _pictures(files: RunFiles) -> str:
    parts: list[str] = []
    for dataset, picked in _chosen(files).items():
        figures: list[str] = []
        piece: Slice | None = None
        for title, path in picked:
            piece = read_slice(path)
            image = f'<img alt="{escape(title)}" src="{data_uri(overlay_png(piece))}">'
            figures.append(f"<figure>{image}<figcaption>{escape(title)}, axial slice {piece.z}</figcaption></figure>")
        names = piece.names if piece else []
        keys = "".join(
            f'<span><i class="key" style="background:{colour(i, len(names))}"></i>{escape(n)}</span>' for i, n in enumerate(names)
        )
        parts.append(f'<h3>{escape(dataset)}</h3><div class="pair">{"".join(figures)}</div><div class="legend">{keys}</div>')
    return f"<section><h2>Scans</h2>{''.join(parts)}</section>" if parts else ""


def _curves(files: RunFiles) -> str:
    def one(title: str, keys: dict[str, str], unit: str = "") -> str:
        return line_chart(title, [Series(name, *files.column(key)) for key, name in keys.items()], unit=unit)

    rows = sorted(files.steps.items())
    per_dataset = [Series(name, *zip(*points, strict=True)) for name, points in _dice_losses(rows).items()]
    waits = [(s, data_stall_s(r) / r["step_s"]) for s, r in rows if r.get("step_s") and "data_wait_s" in r]
    evaluated = [(s, r["mean"]["dice"]) for s, r in sorted(files.history.items()) if r["mean"]["dice"] is not None]
    charts = [
        one("Loss", {"loss": "total", "loss_bce": "BCE", "loss_dice": "Dice loss"}),
        line_chart("Dice loss per dataset", per_dataset, y_range=(0.0, 1.0)),
        line_chart("Dice during training", [Series("mean", *zip(*evaluated, strict=True))], y_range=(0.0, 1.0))
        if evaluated
        else "",
        one("Throughput", {"samples_per_s": "samples/s"}, "samples/s"),
        line_chart(
            "Waiting for data", [Series("share", *zip(*waits, strict=True))], unit="share of step time", y_range=(0.0, 1.0)
        )
        if waits
        else "",
        one("Learning rate", {"lr": "lr"}),
        one("Gradient norm", {"grad_norm": "before clipping"}),
        one("Modality loss", {"loss_modality": "cross entropy"}),
    ]
    drawn = "".join(charts)
    return f'<section><h2>Training</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _dice_losses(rows: Sequence[tuple[float, Json]]) -> dict[str, list[tuple[float, float]]]:
    """(step, Dice loss) of each dataset, from the steps that held it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for step, row in rows:
        for name, losses in row.get("dataset_loss", {}).items():
            if losses.get("dice") is not None:  # a NaN is null in the file
                found.setdefault(name, []).append((step, losses["dice"]))
    return found


def _details(files: RunFiles, split: str) -> str:
    run = escape(str(files.run_dir))
    scan = "SCAN.nii.gz --modality " + str((files.tasks.get("datasets") or [{"modality": "CT"}])[0]["modality"])
    commands = [
        f"python launch/train.py --config {run}/config.json   # goes on from the newest checkpoint",
        f"python launch/evaluate.py --run {run} --split {escape(split)}",
        f"python launch/predict.py --run {run} --input {escape(scan)} --tasks all --out masks",
        f"python launch/report.py --run {run}",
    ]
    boxes = [
        ("Configuration", json.dumps(files.config, indent=1)),
        ("Environment", json.dumps(files.environment, indent=1)),
        ("Tasks", "\n".join(_task_lines(files.tasks))),
    ]
    shown = "".join(
        f"<details><summary>{t}</summary><pre>{escape(text)}</pre></details>" for t, text in boxes if text not in ("{}", "")
    )
    return f"<section><h2>How to repeat it</h2><pre>{chr(10).join(commands)}</pre>{shown}</section>"


def _task_lines(tasks: Json) -> Iterator[str]:
    for dataset in tasks.get("datasets", []):
        names = ", ".join(f"{c['name']} (task {c['task_id']})" for c in dataset["classes"])
        yield f"{dataset['name']} · {dataset['modality']} · {dataset['region']}: {names}"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _json(path: Path) -> Json:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _lines(path: Path) -> Iterator[Json]:
    if not path.is_file():
        return
    with open(path) as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that goes on may be half-written
                continue


def _write(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path
