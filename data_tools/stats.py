"""`hermes-shard stats`: one HTML file with a table, a histogram and a montage per dataset; nothing is loaded from outside."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from data_tools.files import write_bytes
from hermes_dist.shards.store import ShardStore, open_store
from hermes_dist.tasks import DatasetTasks

STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left}"
)
HISTOGRAM_CASES = 20
LABEL_COLOURS = mpl.colormaps["tab20"]


def write_html(url: str, out: Path, *, montage: int = 4) -> None:
    """Write the report of a store. Raises what `open_store` raises."""
    store = open_store(url)
    tasks = store.collection.tasks
    parts = [f"<h1>{html.escape(url)}</h1><p>{len(store.manifest)} cases, {tasks.n_tasks} tasks</p>"]
    parts += [_section(store, dataset, montage) for dataset in tasks.datasets]
    page = f"<!doctype html><meta charset=utf-8><title>shard store</title><style>{STYLE}</style>{''.join(parts)}\n"
    write_bytes(out, page.encode())


def _section(store: ShardStore, dataset: DatasetTasks, montage: int) -> str:
    numbers = store.manifest.rows(dataset.name)
    about = html.escape(f"{dataset.modality}, {dataset.region}, {len(numbers)} cases")
    head = f"<h2>{html.escape(dataset.name)}</h2><p>{about}</p>"
    if not len(numbers):
        return head
    rows = [store.manifest.row(int(i)) for i in numbers]
    voxel_ml = [float(np.prod(r.spacing_mm_zyx)) / 1000 for r in rows]
    lines: list[str] = []
    for c, entry in enumerate(dataset.classes):
        ml = np.array([r.class_voxels[c] * v for r, v in zip(rows, voxel_ml, strict=True)])
        present = ml[ml > 0]
        volume = f"{np.median(present):.2f} ({present.min():.2f} – {present.max():.2f})" if len(present) else "–"
        lines.append(f"<tr><td>{html.escape(entry.name)}<td>{len(present)} / {len(rows)}<td>{volume}")
    table = f"<table><tr><th>class<th>cases<th>median volume, ml (range){''.join(lines)}</table>"
    picks = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), HISTOGRAM_CASES)).astype(int))
    figures = [_histogram(store, dataset, [int(numbers[i]) for i in picks])]
    if montage:
        picks = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), montage)).astype(int))
        figures.append(draw_montage(store, [int(numbers[i]) for i in picks]))
    return head + table + "".join(f'<p><img alt="" src="data:image/png;base64,{f}">' for f in figures)


def _histogram(store: ShardStore, dataset: DatasetTasks, numbers: list[int]) -> str:
    """Intensities of all voxels and of each of the first six classes, normalised units."""
    edges = np.linspace(-5, 5, 101)
    total = np.zeros(100)
    by_class = np.zeros((min(6, len(dataset.classes)), 100))
    for i in numbers:
        image, label = store.read_case(i)
        total += np.histogram(np.clip(image, -5, 5), edges)[0]
        for c in range(len(by_class)):
            inside = image[np.isin(label, dataset.classes[c].values)]
            by_class[c] += np.histogram(np.clip(inside, -5, 5), edges)[0]
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.stairs(total / max(1, total.sum()), edges, label="all voxels", color="0.6", fill=True)
    for c, counts in enumerate(by_class):
        axes.stairs(counts / max(1, counts.sum()), edges, label=dataset.classes[c].name)
    axes.set(xlabel="stored intensity (standard deviations)", ylabel="share", yscale="log")
    axes.legend(fontsize=7)
    return _png(figure)


def draw_montage(store: ShardStore, numbers: list[int]) -> str:
    """Three planes through the labelled centre of each case, labels on top: a PNG in base64."""
    figure = Figure(figsize=(9, 3 * len(numbers)), layout="constrained")
    axes: Any = figure.subplots(len(numbers), 3, squeeze=False)
    for line, i in zip(axes, numbers, strict=True):
        row = store.manifest.row(i)
        image, label = store.read_case(i)
        where = np.argwhere(label)
        centre = np.median(where, axis=0).astype(int) if len(where) else np.array(image.shape) // 2
        spacing = row.spacing_mm_zyx
        for axis, cell in enumerate(line):
            plane, mask = image.take(centre[axis], axis), label.take(centre[axis], axis)
            high, wide = (s for a, s in enumerate(spacing) if a != axis)
            cell.imshow(plane, cmap="gray", origin="lower", aspect=high / wide)
            cell.imshow(LABEL_COLOURS((mask % 20 + 0.5) / 20, alpha=0.45 * (mask > 0)), origin="lower", aspect=high / wide)
            cell.set_axis_off()
        line[0].set_title(f"{row.case_id} · {row.split} · {' × '.join(map(str, row.shape_vox_zyx))}", fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return base64.b64encode(buffer.getvalue()).decode()
