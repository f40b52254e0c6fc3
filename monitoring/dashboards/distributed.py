"""*Distributed health*: are all ranks there, even, and safe to lose?"""

from __future__ import annotations

from monitoring.dashboards.panels import BYTES, RANK, RUN, SECONDS, SHARE, WINDOW, Board, PanelSpec, quantiles

_BUSY = f"rate(hermes_busy_seconds_total{{{RUN}}}[{WINDOW}]) / (rate(hermes_patches_total{{{RUN}}}[{WINDOW}]) > 0)"
_STEPS = f"rate(hermes_step_duration_seconds_sum{{{RANK}}}[{WINDOW}])"

_CHECKPOINTS_S = f'rate(hermes_step_part_seconds_sum{{{RANK},part="checkpoint"}}[{WINDOW}])'

_RANKS = (
    PanelSpec(
        "Ranks reporting",
        (
            (f"count by (run) (hermes_world_size{{{RUN}}})", "reporting {{run}}"),
            (f"max by (run) (hermes_world_size{{{RUN}}})", "expected {{run}}"),
        ),
        "Fewer than expected: a rank is gone, or its endpoint cannot be reached (monitor.prometheus_host=0.0.0.0 on several "
        "hosts).",
        kind="stat",
        width=6,
    ),
    PanelSpec(
        "Endpoints down",
        (('sum(1 - up{job="hermes"})', "down"),),
        "Listed in a run's prometheus_targets.json but not answering. If the run was killed, resume it or delete its directory.",
        kind="stat",
        width=6,
    ),
    PanelSpec(
        "Time since the last step",
        ((f"time() - min by (run) (hermes_last_step_timestamp_seconds{{{RUN}}})", "{{run}}"),),
        "Of the rank that is furthest behind. Many times the step time: a hang; the stacks of all ranks are in the log after "
        "train.step_limit_s.",
        SECONDS,
        "stat",
        6,
    ),
    PanelSpec(
        "Spread over ranks",
        ((f"max by (run) ({_BUSY}) / min by (run) ({_BUSY})", "{{run}}"),),
        "Own time per patch of the slowest rank over the fastest, without waiting for each other. Above 1.3: the panel below "
        "names the straggler.",
        kind="stat",
        width=6,
    ),
    PanelSpec(
        "Own time per patch by rank",
        (
            (
                f"rate(hermes_busy_seconds_total{{{RANK}}}[{WINDOW}]) / (rate(hermes_patches_total{{{RANK}}}[{WINDOW}]) > 0)",
                "rank {{rank}} {{run}}",
            ),
        ),
        "The straggler is the line on top: look at its host (clocks, temperature, other jobs, disk). Data wait and forward pass; "
        "under ZeRO-3 the latter gathers parameters, which is waiting for others too. Per patch, as ranks have uneven shares "
        "where global_batch does not divide by them; those with fewer patches may be a little above for it.",
        SECONDS,
        width=12,
    ),
    PanelSpec(
        "Step time by part and rank",
        (
            (
                f"sum by (rank, part) (rate(hermes_step_part_seconds_sum{{{RANK}}}[{WINDOW}])) / on (rank) group_left () sum by "
                f"(rank) (rate(hermes_step_duration_seconds_count{{{RANK}}}[{WINDOW}]))",
                "{{rank}} {{part}}",
            ),
        ),
        "Seconds per step; checkpoints are spread over all steps. A rank with less communication than the others is the one they "
        "wait for.",
        SECONDS,
        width=12,
    ),
    PanelSpec(
        "Share of communication and waiting",
        (
            (
                "sum by (run) "
                f'(rate(hermes_step_part_seconds_sum{{{RANK},part=~"communication|data_wait|checkpoint"}}[{WINDOW}])) / sum by '
                f"(run) ({_STEPS} or {_CHECKPOINTS_S})",
                "{{run}}",
            ),
            (
                f"sum by (run) (rate(hermes_data_stall_seconds_total{{{RANK}}}[{WINDOW}])) / sum by "
                f"(run) ({_STEPS} or {_CHECKPOINTS_S})",
                "data {{run}}",
            ),
        ),
        "Time that is not computing, of steps and checkpoints together. Grows with ranks: larger micro-batch, lower ZeRO stage, "
        "faster links; launch/plan.py gives what to expect. data: some rank lacks its samples, and the others book their wait "
        "for it as communication or backward: see Data path first.",
        SHARE,
    ),
    PanelSpec(
        "MFU by rank",
        ((f"hermes_mfu_ratio{{{RANK}}}", "rank {{rank}} {{run}}"),),
        "Ranks differ only if their devices do: throttling, or another card.",
        SHARE,
    ),
    PanelSpec(
        "Memory by rank",
        ((f'hermes_memory_bytes{{{RANK},kind=~"rss|device_peak"}}', "rank {{rank}} {{kind}} {{run}}"),),
        "Uneven: uneven patches or a leak. Near the device's size: checkpointing, or a higher ZeRO stage.",
        BYTES,
    ),
)

_CHECKPOINTS = (
    PanelSpec(
        "Checkpoint age",
        ((f'time() - max by (run) (hermes_checkpoint_timestamp_seconds{{{RUN},rank="0"}})', "{{run}}"),),
        "What a crash now would cost. Older than a few times checkpoint.every_steps: look for failures and at the disk.",
        SECONDS,
        "stat",
        6,
    ),
    PanelSpec(
        "Checkpoint failures",
        ((f"max by (run) (hermes_checkpoint_failures_total{{{RUN}}})", "{{run}}"),),
        "Any: the log names the file; mostly a full disk or a file system that went away.",
        kind="stat",
        width=6,
        quiet=True,
    ),
    PanelSpec(
        "Checkpoint size",
        ((f"max by (run) (hermes_checkpoint_size_bytes{{{RUN}}})", "{{run}}"),),
        "All ranks' parts. × (checkpoint.keep + 1) must fit the disk.",
        BYTES,
        "stat",
        6,
    ),
    PanelSpec(
        "Telemetry's own share",
        ((f"sum by (run) (rate(hermes_telemetry_seconds_total{{{RANK}}}[{WINDOW}])) / sum by (run) ({_STEPS})", "{{run}}"),),
        "Must stay below 1 %. Above: the run directory lies on a slow file system.",
        SHARE,
        "stat",
        6,
    ),
    PanelSpec(
        "Checkpoint duration",
        quantiles("hermes_checkpoint_duration_seconds", RANK, "phase"),
        "snapshot stops the training, write runs beside it. A write longer than the time between checkpoints: raise "
        "checkpoint.every_steps.",
        SECONDS,
        width=12,
    ),
    PanelSpec(
        "Skipped steps",
        ((f"sum by (run) (increase(hermes_skipped_steps_total{{{RUN}}}[{WINDOW}]))", "{{run}}"),),
        "NaN or Inf steps in the interval. Repeated: fp32, lower learning rate, and check the named samples.",
        width=12,
    ),
)

BOARD = Board(
    "hermes-distributed",
    "Hermes · Distributed health",
    "Are all ranks there, even, and safe to lose?",
    (("Ranks", _RANKS), ("Checkpoints and guards", _CHECKPOINTS)),
)
