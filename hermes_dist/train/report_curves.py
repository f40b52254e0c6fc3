"""Curves as small inline SVG: no script, no outside file, colours from the page's style sheet.

Pure text in, text out. Long runs are averaged into at most `POINTS` bins, so a report stays small whatever the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

POINTS = 300
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 34


@dataclass(frozen=True)
class Series:
    """One line: its legend, x values (steps) and y values; NaN is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def binned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means of at most `points` equal groups of consecutive values that are finite."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not kept:
        return [], []
    groups = np.array_split(np.array(kept), min(points, len(kept)))
    return [float(g[:, 0].mean()) for g in groups], [float(g[:, 1].mean()) for g in groups]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, series: Sequence[Series], *, unit: str = "", y_range: tuple[float, float] | None = None) -> str:
    """A figure with the lines, a grid, and a legend where there is more than one line; empty text if nothing can be drawn."""
    lines = [(s.name, *binned(s.x, s.y)) for s in series]
    lines = [line for line in lines if line[1]]
    if not lines:
        return ""
    xs, ys = [v for line in lines for v in line[1]], [v for line in lines for v in line[2]]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_range or _padded(min(ys), max(ys))

    def place(x: float, y: float) -> str:
        px = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts: list[str] = []
    for value in ticks(y_low, y_high):
        start, end = place(x_low, value), place(x_high, value)
        parts.append(f'<polyline class="grid" points="{start} {end}"/>{_text(start, _number(value), "end", -6, 4)}')
    for value in ticks(x_low, x_high, 6):
        parts.append(_text(place(value, y_low), _number(value), "middle", 0, 16))
    for index, (name, x, y) in enumerate(lines):
        points = " ".join(place(a, b) for a, b in zip(x, y, strict=True))
        shape = f'<polyline class="line c{index % 10}" points="{points}"/>'
        if len(x) == 1:
            cx, cy = points.split(",")
            shape = f'<circle class="dot c{index % 10}" cx="{cx}" cy="{cy}" r="3"/>'
        parts.append(f"<g><title>{escape(name)}: last {_number(y[-1])} {escape(unit)}</title>{shape}</g>")
    parts.append(_text(f"{WIDTH - RIGHT},{HEIGHT - 4}", "step", "end", 0, 0))
    legend = "".join(f'<span><i class="key c{i % 10}"></i>{escape(line[0])}</span>' for i, line in enumerate(lines))
    head = escape(title) + (f" <small>{escape(unit)}</small>" if unit else "")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{head}</figcaption>{svg}<div class="legend">{legend}</div></figure>'


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.4 * high else low - margin), high + margin


def _text(at: str, text: str, anchor: str, dx: float, dy: float) -> str:
    x, y = (float(v) for v in at.split(","))
    return f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.4g}"
