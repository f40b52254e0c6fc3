"""One self-contained HTML page per sweep: figures, fits, tables and the commands that made them."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hermes_dist.scaling import figures
from hermes_dist.scaling.curves import gains_of, size_curves
from hermes_dist.scaling.laws import LawFit, NotEnoughPoints
from hermes_dist.scaling.sweep import Member, SweepConfig
from hermes_dist.scaling.sweep_results import PARAMETERS, finished, law_of, like_groups, throughput_of
from hermes_dist.scaling.throughput import ThroughputFit, TooFewRuns, efficiency

TRUSTED_ERROR = 0.15
"""Relative error up to which a fit of step times may be extrapolated. Equal work differs by a tenth from run to run on an idle
host; a fit that misses by more has no term for what happened, or was measured beside other programs."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}th:first-child,td:first-child{text-align:left}"
    "svg{max-width:100%;height:auto}.no{background:#fff3cd;padding:.6rem 1rem}code{font-size:13px}"
)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; floats with four significant digits."""

    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def report(sweep: SweepConfig, members: Sequence[Member], rows: Sequence[dict[str, Any]], command: str) -> str:
    """The page. `command` is the line that made the sweep."""
    done = finished(rows)
    parts = [f"<p>{len(done)} of {len(rows)} runs finished.</p>"]
    if done:
        parts += _scaling(done) if sweep.study == "scaling" else _throughput(done)
    shown = (
        "member",
        "state",
        "ranks",
        "parameters",
        "samples",
        "loss",
        "dice",
        "step_s",
        "data_wait_s",
        "samples_per_s",
        "reason",
    )
    parts += ["<h2>Runs</h2>", table(shown, [[row.get(key) for key in shown] for row in rows])]
    commands = "\n".join(shlex.join(["python", *m.command(Path("launch/train.py"))[1:]]) for m in members)
    parts += ["<h2>Commands</h2>", f"<p><code>{html.escape(command)}</code></p>"]
    parts += [f"<details><summary>one run each</summary><pre>{html.escape(commands)}</pre></details>"]
    title = html.escape(f"Sweep {sweep.name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1>{''.join(parts)}</html>\n"
    )


def _scaling(done: list[dict[str, Any]]) -> list[str]:
    """A law for each group of runs that one law may describe, then the curves of Dice."""
    groups = like_groups(done)
    parts = ["<h2>Loss = E + A / N<sup>α</sup> + B / D<sup>β</sup></h2>"]
    if len(groups) > 1:
        parts.append(f"<p>{len(groups)} kinds of runs differ in more than size, data and seed: a law each.</p>")
    for name, rows in groups.items():
        fit = law_of(rows)
        sized = [row for row in rows if row["parameters"] and row["loss"]]
        parts += [f"<h3>{html.escape(name)}</h3>"] if len(groups) > 1 else []
        parts += [figures.law_figure(sized, fit if isinstance(fit, LawFit) else None)] if sized else []
        parts += [f'<p class="no">{html.escape(fit.reason)}</p>'] if isinstance(fit, NotEnoughPoints) else _law(fit, sized)
    return [*parts, *_curves(done)]


def _curves(done: list[dict[str, Any]]) -> list[str]:
    """Dice by backbone size, a curve a method and budget (the paper's Figure 3 B)."""
    curves = size_curves(done)
    if not curves:
        return []
    lines = [
        [name, point.parameters, point.mean, "–" if point.half_width is None else f"± {point.half_width:.3f}", point.runs]
        for name, points in curves.items()
        for point in points
    ]
    gains = [f"{name} gains {value:+.3f} from its smallest size to its largest" for name, value in gains_of(curves)]
    return [
        "<h2>Dice by model size</h2>",
        figures.curves_figure(curves),
        table(("curve", "backbone parameters", "mean Dice", "95 %", "runs"), lines),
        f"<p>{html.escape('; '.join(gains))}.</p>" if gains else '<p class="no">not enough points: one size a curve.</p>',
    ]


def _law(fit: LawFit, sized: list[dict[str, Any]]) -> list[str]:
    values = [[name, *(getattr(law, name) for law in (fit.law, fit.low, fit.high))] for name in PARAMETERS]
    parts = [table(("parameter", "value", "95 % low", "95 % high"), values)]
    held_out = (
        f"Without its {fit.held_out_runs} largest runs the law predicts them within {fit.held_out_error:.1%}."
        if fit.held_out_error is not None
        else "Too few runs to leave the largest out, so the extrapolation is not tested."
    )
    parts.append(f"<p>Residual {fit.relative_error:.2%} of the loss. {held_out}</p>")
    if fit.warnings:
        return [*parts, *(f'<p class="no">{html.escape(text)}; do not extrapolate.</p>' for text in fit.warnings)]
    kappa = float(np.median([row["flops_per_sample"] / row["parameters"] for row in sized]))
    compute = [row["flops_per_sample"] * row["samples"] for row in sized]
    parts += ["<h2>Where compute is best spent</h2>", figures.frontier_figure(fit, kappa, compute)]
    lines = []
    for factor in (1, 10, 100):
        n, d = fit.law.optimum(factor * max(compute), kappa)
        low, high = fit.interval(n, d)
        lines.append([f"{factor} × the largest run", n, d, float(fit.law.loss(n, d)), f"{low:.4g} – {high:.4g}"])
    return [*parts, table(("compute", "parameters", "samples", "predicted loss", "95 % interval"), lines)]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _throughput(done: list[dict[str, Any]]) -> list[str]:
    """Figure, table and fit for each group of runs that differ in ranks, batch, stage and size only."""
    groups = like_groups(done)
    parts = ["<h2>Throughput</h2>"]
    if len(groups) > 1:
        parts.append(f"<p>{len(groups)} kinds of runs differ in more than ranks, batch, stage and size: a fit each.</p>")
    for name, rows in groups.items():
        parts += [f"<h3>{html.escape(name)}</h3>"] if len(groups) > 1 else []
        parts += _throughput_group(rows)
    return parts


def _throughput_group(group: list[dict[str, Any]]) -> list[str]:
    runs, fit = throughput_of(group)
    if not runs:
        return ['<p class="no">No fit: no run has both step times and known parameters.</p>']
    parts = [figures.throughput_figure(runs, fit if isinstance(fit, ThroughputFit) else None)]
    rows = [
        [
            f"ZeRO-{r.stage}",
            r.ranks,
            r.devices or r.ranks,
            r.global_batch,
            r.micro_batch,
            r.step_s,
            r.wait_s,
            r.samples_per_s,
            *map(_share, both),
        ]
        for r, *both in efficiency(runs)
    ]
    header = ("stage", "ranks", "devices", "global batch", "micro-batch", "step s", "data wait s", "samples/s", "weak", "strong")
    parts.append(table(header, rows))
    parts.append(
        "<p>Efficiency per device against one rank with as many samples per rank (weak) or the same global batch (strong), "
        "both of its micro-batch; – where the sweep has no such run.</p>"
    )
    if isinstance(fit, TooFewRuns):
        return [*parts, f'<p class="no">No fit: {html.escape(fit.reason)}.</p>']
    error = "not tested" if fit.held_out_error is None else f"{fit.held_out_error:.1%}"
    parts.append(f"<p>Fit: residual {fit.relative_error:.1%}; largest world predicted from the smaller ones: {error}.</p>")
    if max(fit.relative_error, fit.held_out_error or 0.0) > TRUSTED_ERROR:
        parts.append(f'<p class="no">One of these is above {TRUSTED_ERROR:.0%}: do not extrapolate.</p>')
    parts.append(table(("term", "seconds"), list(fit.terms.items())))
    largest = max(runs, key=lambda r: r.ranks)
    share = largest.samples_per_rank
    stages = sorted({r.stage for r in runs})
    lines: list[list[object]] = []
    for world in (2**k for k in range(9)):
        model = largest.parameters, largest.micro_steps
        rates = [fit.samples_per_s(world, stage, share * world, *model) for stage in stages]
        alone = [fit.samples_per_s(1, stage, share, *model) for stage in stages]
        cells = [f"{rate:.4g} ({rate / world / one:.0%})" for rate, one in zip(rates, alone, strict=True)]
        lines.append([world, *cells])
    parts.append("<h4>Extrapolated: samples per second, and efficiency against one rank (weak scaling)</h4>")
    if largest.global_batch < largest.ranks:
        parts.append(
            f'<p class="no">{largest.ranks} ranks shared a global batch of {largest.global_batch}: '
            f"{largest.ranks - largest.global_batch} of them computed filler. Extrapolated with one sample per rank.</p>"
        )
    parts.append(table(("ranks", *(f"ZeRO-{stage}" for stage in stages)), lines))
    return [
        *parts,
        f"<p>Assumes a device for every rank, {share} samples per rank, the links and hosts of this sweep at any distance, a "
        "wait for data per sample as measured here (launch/plan.py --simulate-storage simulates a shared storage), and a latency "
        "that grows with log2 of the ranks.</p>",
    ]
