"""*Run overview*: is it going forward, how fast, and does it learn?"""

from __future__ import annotations

from monitoring.dashboards.panels import BYTES, RANK, RUN, SECONDS, SHARE, WINDOW, Board, PanelSpec, quantiles

RATE_0 = f'rate(hermes_steps_total{{{RUN},rank="0"}}[{WINDOW}])'

_PROGRESS = (
    PanelSpec(
        "Progress",
        ((f"max by (run) (hermes_step{{{RUN}}}) / max by (run) (hermes_max_steps{{{RUN}}})", "{{run}}"),),
        "Finished share of the training. If it stands still: look at the alerts, then at `Time since the last step` in "
        "Distributed health.",
        SHARE,
        "stat",
        4,
    ),
    PanelSpec(
        "Time left",
        (
            (
                f"(max by (run) (hermes_max_steps{{{RUN}}}) - max by (run) (hermes_step{{{RUN}}})) / max by (run) ({RATE_0})",
                "{{run}}",
            ),
        ),
        "At the present speed. If it grows: compare the step time below with an hour ago, and see which part grew.",
        SECONDS,
        "stat",
        4,
    ),
    PanelSpec(
        "Samples per second",
        ((f"sum by (run) (rate(hermes_samples_total{{{RUN}}}[{WINDOW}]))", "{{run}}"),),
        "All ranks together. If it is below what launch/plan.py expected: data wait means the data path, else look at MFU.",
        kind="stat",
        width=4,
    ),
    PanelSpec(
        "Data wait",
        (
            (
                f"avg by (run) (rate(hermes_data_stall_seconds_total{{{RUN}}}[{WINDOW}])) / "
                f"avg by (run) (rate(hermes_step_duration_seconds_sum{{{RUN}}}[{WINDOW}]))",
                "{{run}}",
            ),
        ),
        "Share of the step time in which any rank waits for its samples, and all others for it. Above 5 %: open the Data path "
        "dashboard and see which ranks wait, and what for.",
        SHARE,
        "stat",
        4,
    ),
    PanelSpec(
        "Mean Dice",
        ((f"max by (run, split) (hermes_mean_dice_ratio{{{RUN}}})", "{{run}} {{split}}"),),
        "Last evaluation. If it falls while the loss falls too: overfitting, or one dataset pushes the others away "
        "(Per-dataset learning).",
        SHARE,
        "stat",
        4,
    ),
    PanelSpec(
        "Skipped steps",
        ((f"max by (run) (hermes_skipped_steps_total{{{RUN}}})", "{{run}}"),),
        "Steps with a NaN or Inf loss or gradient. A few in bf16 are harmless; if it grows: lower the learning rate or use "
        "fp32, and look "
        "at the sample ids that the log names.",
        kind="stat",
        width=4,
    ),
)

_SPEED = (
    PanelSpec(
        "Throughput",
        (
            (f"sum by (run) (rate(hermes_samples_total{{{RUN}}}[{WINDOW}]))", "samples/s {{run}}"),
            (f"sum by (run) (rate(hermes_patches_total{{{RUN}}}[{WINDOW}]))", "patches/s {{run}}"),
        ),
        "Patches include filler: a gap between both lines means that some ranks had no sample for one of a step's "
        "micro-batches. Make global_batch a multiple of the ranks; without it ranks with fewer samples wait for the others, "
        "which shows no gap where they fill as many micro-batches.",
    ),
    PanelSpec(
        "Voxels per second",
        ((f"sum by (run) (rate(hermes_voxels_total{{{RUN}}}[{WINDOW}]))", "{{run}}"),),
        "Comparable between patch sizes. If it drops at an equal number of ranks: see the step time parts.",
    ),
    PanelSpec(
        "MFU",
        ((f"avg by (run) (hermes_mfu_ratio{{{RANK}}})", "{{run}}"),),
        "Model FLOPs over the device's peak, without recomputation. Low while data wait is low: larger micro-batch, compile, "
        "bf16, fewer checkpointed blocks.",
        SHARE,
    ),
    PanelSpec(
        "Step time",
        quantiles("hermes_step_duration_seconds", RANK),
        "If p99 is far above p50: single slow steps (checkpoints, stragglers, slow storage). If p50 itself grew: see the parts "
        "on the right.",
        SECONDS,
    ),
    PanelSpec(
        "Mean time by part of a step",
        (
            (
                f"sum by (part) (rate(hermes_step_part_seconds_sum{{{RANK}}}[{WINDOW}])) / on () group_left () sum "
                f"(rate(hermes_step_duration_seconds_count{{{RANK}}}[{WINDOW}]))",
                "{{part}}",
            ),
        ),
        "Seconds per step; checkpoints, which come in some steps only, are spread over all. Find the part that grew. data_wait: "
        "Data path; communication: Distributed health; checkpoint: write less often, or in the background.",
        SECONDS,
        "stack",
    ),
    PanelSpec(
        "Memory",
        ((f"max by (run, kind) (hermes_memory_bytes{{{RANK}}})", "{{kind}} {{run}}"),),
        "Largest over ranks. rss that keeps growing: a leak in a worker or a reader; device_peak near the card: next "
        "out-of-memory is close, "
        "use checkpointing or a higher ZeRO stage (launch/plan.py says which).",
        BYTES,
    ),
)

_LEARNING = (
    PanelSpec(
        "Loss",
        ((f"max by (run, term) (hermes_loss{{{RUN}}})", "{{term}} {{run}}"),),
        "If total jumps up and stays: the learning rate is too high after warm-up, or a damaged dataset came in; if dice stays "
        "near 1 while bce falls: "
        "small structures are not found, raise the foreground probability.",
    ),
    PanelSpec(
        "Learning rate",
        ((f"max by (run) (hermes_learning_rate{{{RUN}}})", "{{run}}"),),
        "Warm-up, then decay. Anything else means that a resumed run got another max_steps or schedule.",
    ),
    PanelSpec(
        "Gradient norm",
        quantiles("hermes_gradient_norm", RUN),
        "Before clipping. If p99 is always far above clip_norm, every step is clipped: lower the learning rate. If it goes to "
        "0: dead loss terms.",
    ),
    PanelSpec(
        "What runs",
        ((f"hermes_run_info{{{RANK}}}", ""),),
        "World size, device and commit of each rank. A rank with another commit than the others: stop and restart the job.",
        kind="table",
        width=24,
    ),
)

BOARD = Board(
    "hermes-run",
    "Hermes · Run overview",
    "Is the run going forward, how fast, and does it learn?",
    (("Now", _PROGRESS), ("Speed", _SPEED), ("Learning", _LEARNING)),
)
