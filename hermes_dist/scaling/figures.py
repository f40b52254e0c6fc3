"""Figures of the reports, as SVG text that stands in a page without any other file."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hermes_dist.scaling.curves import CurvePoint
from hermes_dist.scaling.laws import LawFit
from hermes_dist.scaling.throughput import Measured, ThroughputFit

Group = tuple[int, int, int, int]
"""Parameters, ZeRO stage, samples per rank, passes per step."""


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 4.2)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(True, which="both", alpha=0.25)
    return figure, axes


def law_figure(rows: Sequence[dict[str, Any]], fit: LawFit | None) -> str:
    """Loss against parameters, one colour a data budget; lines and bands are the fit and its 95 % interval."""
    figure, axes = _axes("Loss by model size and data", "parameters", "loss")
    budgets = sorted({row["samples"] for row in rows})
    sizes = np.array([row["parameters"] for row in rows], float)
    grid = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 60)
    for i, budget in enumerate(budgets):
        color = f"C{i}"
        points = [(row["parameters"], row["loss"]) for row in rows if row["samples"] == budget]
        axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{budget:,} samples")
        if fit:
            axes.plot(grid, fit.law.loss(grid, budget), "-", color=color)
            band = np.array([law.loss(grid, budget) for law in fit.samples])
            axes.fill_between(grid, *np.quantile(band, [0.025, 0.975], axis=0), color=color, alpha=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return _svg(figure)


def frontier_figure(fit: LawFit, kappa: float, compute: Sequence[float]) -> str:
    """Best model size for a compute budget, with the bootstrap's 95 % band. `kappa` = FLOPs per parameter and sample."""
    figure, axes = _axes("Compute-optimal model size", "training FLOPs", "parameters")
    budgets = np.geomspace(min(compute), 10 * max(compute), 40)
    axes.plot(budgets, [fit.law.optimum(c, kappa)[0] for c in budgets])
    usable = [law for law in fit.samples if law.A > 0 and law.B > 0]
    if usable:
        band = np.array([[law.optimum(c, kappa)[0] for c in budgets] for law in usable])
        axes.fill_between(budgets, *np.quantile(band, [0.025, 0.975], axis=0), alpha=0.2)
    axes.axvspan(min(compute), max(compute), color="grey", alpha=0.12, label="compute of the sweep")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return _svg(figure)


def curves_figure(curves: dict[str, list[CurvePoint]]) -> str:
    """Dice against model size by method, with 95 % intervals over seeds."""
    figure, axes = _axes("Dice by model size", "parameters of the backbone", "mean Dice")
    for name, points in curves.items():
        bars = [point.half_width or 0.0 for point in points]
        axes.errorbar([p.parameters for p in points], [p.mean for p in points], yerr=bars, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.legend()
    return _svg(figure)


def throughput_figure(runs: Sequence[Measured], fit: ThroughputFit | None) -> str:
    """Samples per second against ranks, by model size, ZeRO stage and samples per rank.

    Solid lines are the fit on the runs' own devices, dashed ones the fit with a device for every rank, where these differ.
    """
    figure, axes = _axes("Throughput by ranks", "ranks", "samples per second")
    sizes = {run.parameters for run in runs}
    for i, (group, members) in enumerate(sorted(throughput_groups(runs).items())):
        parameters, stage, share, micro_steps = group
        label = f"ZeRO-{stage}, {share} per rank" + (f" in {micro_steps} passes" if micro_steps > 1 else "")
        label += f", {parameters / 1e6:.3g} M" if len(sizes) > 1 else ""
        points = sorted((run.ranks, run.samples_per_s) for run in members)
        axes.plot(*zip(*points, strict=True), "o", color=f"C{i % 10}", label=label)
        for style, worlds, rates in fitted_lines(group, members, fit, 2 * max(r.ranks for r in runs)) if fit else ():
            axes.plot(worlds, rates, style, color=f"C{i % 10}", alpha=0.6)
    if fit:
        axes.plot([], [], "-", color="grey", label="fit, on the devices of the runs")
        axes.plot([], [], "--", color="grey", label="fit, a device for every rank")
    axes.legend(fontsize=8)
    return _svg(figure)


def throughput_groups(runs: Sequence[Measured]) -> dict[Group, list[Measured]]:
    """(parameters, stage, samples per rank, passes) → its runs."""
    groups: dict[Group, list[Measured]] = defaultdict(list)
    for run in runs:
        groups[run.parameters, run.stage, run.samples_per_rank, run.micro_steps].append(run)
    return dict(groups)


def fitted_lines(
    group: Group, runs: Sequence[Measured], fit: ThroughputFit, most_ranks: int
) -> Iterator[tuple[str, list[int], list[float]]]:
    """(line style, ranks, samples per second): `-` on the runs' own devices, `--` with one for every rank where that differs."""
    parameters, stage, share, micro_steps = group
    worlds = list(range(1, most_ranks + 1))
    known = [run.devices for run in runs if run.devices]
    # Runs of one group on hosts of different sizes: the largest host's, as there are no more ranks a device on it.
    for style, devices in (("-", max(known, default=None)), ("--", None)):
        rates = [fit.samples_per_s(w, stage, share * w, parameters, micro_steps, devices=devices) for w in worlds]
        if style == "-" or (known and max(known) < most_ranks):
            yield style, worlds, rates
