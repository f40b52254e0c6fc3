"""Pictures of evaluated scans: image, reference and prediction side by side, as PNG bytes.

Slices are drawn as radiologists look at them: the patient's right on the left, anterior up, pixels in true proportion.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from hermes_dist.train.evaluate_slices import Slice

DARK, LIGHT = "#10141a", "#d8dee9"
PALETTE = ("#ff6b6b", "#4ecdc4", "#ffd166", "#9b8cff", "#6bcb77", "#ff9f68", "#5aa9e6", "#f78fb3", "#c8e06a", "#b08968")


def colour(index: int, count: int) -> str:
    """Colour of a class as #rrggbb: ten distinct ones, else evenly spread over the colour circle."""
    return PALETTE[index] if count <= len(PALETTE) else to_hex(colormaps["hsv"](index / count))


def draw_panel(axes: Axes, piece: Slice, masks: npt.NDArray[np.bool_] | None, title: str = "") -> None:
    """One panel: the image, and masks (K, Y, X) as a translucent fill with an outline."""
    turned = piece.image[::-1, ::-1]
    rgb = np.repeat(turned[..., None].astype(np.float32) / 255, 3, axis=2)
    present = [] if masks is None else [k for k in range(len(masks)) if masks[k].any()]
    for k in present:
        area = masks[k][::-1, ::-1] if masks is not None else None
        rgb[area] = 0.62 * rgb[area] + 0.38 * np.array(to_rgb(colour(k, len(piece.names))))
    height_mm, width_mm = (n * s for n, s in zip(turned.shape, piece.spacing_mm_yx, strict=True))
    extent = (0.0, width_mm, height_mm, 0.0)
    axes.imshow(rgb, extent=extent, interpolation="nearest")
    for k in present:
        if masks is not None:
            padded = np.pad(masks[k][::-1, ::-1].astype(np.float32), 1)
            y = (np.arange(padded.shape[0]) - 0.5) * piece.spacing_mm_yx[0]
            x = (np.arange(padded.shape[1]) - 0.5) * piece.spacing_mm_yx[1]
            axes.contour(x, y, padded, levels=[0.5], colors=[colour(k, len(piece.names))], linewidths=1.1)
    axes.set_xlim(0, width_mm)
    axes.set_ylim(height_mm, 0)
    axes.set_axis_off()
    if title:
        axes.set_title(title, color=LIGHT, fontsize=8, pad=3)


def overlay_png(piece: Slice) -> bytes:
    """Image | reference | prediction of one scan."""
    height_mm, width_mm = (n * s for n, s in zip(piece.image.shape, piece.spacing_mm_yx, strict=True))
    width_in = 6.6
    figure = Figure(figsize=(width_in, min(max(width_in / 3 * height_mm / width_mm, 1.0), 4.0) + 0.28), facecolor=DARK)
    for index, (title, masks) in enumerate((("image", None), ("reference", piece.reference), ("prediction", piece.prediction))):
        draw_panel(figure.add_subplot(1, 3, index + 1), piece, masks, title)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.03)
    return _png(figure, dpi=110)


def overview_png(pieces: Sequence[tuple[str, Slice]], result: dict[str, Any], losses: tuple[list[float], list[float]]) -> bytes:
    """One picture for a README: per dataset reference above prediction, the loss, and Dice per class with its interval."""
    columns = max(len(pieces), 1)
    figure = Figure(figsize=(2.6 * columns, 7.6), facecolor=DARK)
    grid = figure.add_gridspec(3, 2 * columns, height_ratios=[1, 1, 1.05], hspace=0.12, wspace=0.08)
    for index, (dataset, piece) in enumerate(pieces):
        for row, (name, masks) in enumerate((("reference", piece.reference), ("prediction", piece.prediction))):
            axes = figure.add_subplot(grid[row, 2 * index : 2 * index + 2])
            draw_panel(axes, piece, masks, dataset if row == 0 else "")
            if index == 0:
                axes.text(
                    -0.04, 0.5, name, transform=axes.transAxes, rotation=90, va="center", ha="right", color=LIGHT, fontsize=9
                )
    _loss_axes(figure.add_subplot(grid[2, :columns]), losses)
    _dice_axes(figure.add_subplot(grid[2, columns:]), result)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.07, top=0.95)
    return _png(figure, dpi=130)


def data_uri(png: bytes) -> str:
    """The picture as a `data:` URI, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _loss_axes(axes: Axes, losses: tuple[list[float], list[float]]) -> None:
    axes.plot(*losses, color=PALETTE[1], linewidth=1.4)
    axes.set_title("training loss", color=LIGHT, fontsize=9)
    axes.set_xlabel("step", color=LIGHT, fontsize=8)
    _dark(axes)


def _dice_axes(axes: Axes, result: dict[str, Any]) -> None:
    rows = [row for row in result.get("per_class", []) if row["dice"] is not None][:40]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    for place, row in enumerate(rows):
        tint = PALETTE[datasets.index(row["dataset"]) % len(PALETTE)]
        axes.barh(place, row["dice"], color=tint, alpha=0.75, height=0.7)
        if row["dice_ci"]:
            axes.plot(row["dice_ci"], [place, place], color=LIGHT, linewidth=1.2)
        axes.text(0.01, place, f"{row['dataset']} / {row['task']}", va="center", fontsize=6.5, color=DARK)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_title(f"Dice on whole scans of the {result.get('split', '')} split, 95 % interval", color=LIGHT, fontsize=9)
    _dark(axes)


def _dark(axes: Axes) -> None:
    axes.set_facecolor("#171c24")
    axes.tick_params(colors=LIGHT, labelsize=7)
    for spine in axes.spines.values():
        spine.set_color("#39424e")


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()
