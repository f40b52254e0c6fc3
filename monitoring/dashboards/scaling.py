"""*Scaling studies*: how runs compare, and what a sweep has found so far."""

from __future__ import annotations

from monitoring.dashboards.panels import COUNT, RUN, SHARE, WINDOW, Board, PanelSpec

_RATE = f"sum by (run) (rate(hermes_samples_total{{{RUN}}}[{WINDOW}]))"

_RUNS = (
    PanelSpec(
        "Throughput against ranks",
        ((f"{_RATE} / max by (run) (hermes_world_size{{{RUN}}})", "{{run}}"),),
        "Samples per second and rank. Flat over runs with more ranks = perfect scaling; where it drops, see Distributed health.",
        width=12,
    ),
    PanelSpec(
        "MFU by run",
        ((f"avg by (run) (hermes_mfu_ratio{{{RUN}}})", "{{run}}"),),
        "Small models have low MFU: kernels are too short. Do not extrapolate throughput from them.",
        SHARE,
        width=12,
    ),
    PanelSpec(
        "Model and compute",
        (
            (f"max by (run) (hermes_parameters{{{RUN}}})", "parameters {{run}}"),
            (f"sum by (run) (hermes_flops_total{{{RUN}}})", "FLOPs spent {{run}}"),
        ),
        "FLOPs are the model's, forward and backward. Runs of one curve should spend what the sweep planned.",
        kind="bars",
        width=12,
    ),
    PanelSpec(
        "Loss by run",
        ((f'max by (run) (hermes_loss{{{RUN},term="total"}})', "{{run}}"),),
        "A run that rises for long has diverged: the sweep stops it; lower its learning rate.",
        width=12,
    ),
)

_SWEEP = (
    PanelSpec(
        "Runs by state",
        ((f"max by (run, state) (hermes_sweep_runs{{{RUN}}})", "{{state}} {{run}}"),),
        "failed runs are tried again when the sweep is started again; their log is in the run's directory. Empty when no sweep "
        "runs.",
        COUNT,
        "stack",
        quiet=True,
    ),
    PanelSpec(
        "Final loss",
        (
            (
                f"max by (parameters, samples, member) (hermes_sweep_loss{{{RUN}}})",
                "{{parameters}} parameters, {{samples}} samples",
            ),
        ),
        "Must fall with parameters and with samples. If not: too short a warm-up, or noise larger than the effect (more seeds).",
        kind="bars",
        quiet=True,
    ),
    PanelSpec(
        "Measured throughput",
        ((f"max by (mode, ranks, member) (hermes_sweep_samples_per_second{{{RUN}}})", "{{mode}} {{ranks}} ranks {{member}}"),),
        "Samples per second by ranks. Far below ranks × one rank: more ranks than cores, or communication.",
        kind="bars",
        quiet=True,
    ),
    PanelSpec(
        "Fitted law",
        ((f"max by (law, parameter, bound) (hermes_law_value{{{RUN}}})", ""),),
        "Parameters with their bootstrap interval (low, high). Intervals wider than the value: not enough points, extend the "
        "sweep.",
        kind="table",
        width=24,
        quiet=True,
    ),
)

BOARD = Board(
    "hermes-scaling",
    "Hermes · Scaling studies",
    "How runs compare, and what a sweep has found so far.",
    (("Runs", _RUNS), ("Sweep", _SWEEP)),
    (),
)
