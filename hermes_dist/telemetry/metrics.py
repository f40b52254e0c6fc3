"""The METRICS table: every number that a run exports, with its kind, unit, labels and meaning.

One table feeds the Prometheus registry, the documentation (`table_markdown`), the dashboards and the tests. Names follow the
Prometheus conventions: prefix `hermes_`, base units (seconds, bytes, a ratio rather than per cent) at the end of the name,
`_total` on counters. Each metric also carries the labels `run` and `rank` (RUN_LABELS). A step number is never a label: it
would make a new series every step. Rates, shares and spreads are PromQL's work; here are only the raw counts and times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

RUN_LABELS = ("run", "rank")
"""Labels of every metric, set by `Telemetry`."""

STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
"""Times inside a step: from a millisecond part on a GPU to a full-size model on a laptop."""
LONG_BUCKETS_S = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)
"""Checkpoints and evaluations."""
NORM_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)
"""Gradient norms: half decades around the clip norm 1."""


@dataclass(frozen=True)
class Metric:
    """One row of METRICS. `unit` is `""` where the metric counts things or is a pure number."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _rows() -> tuple[Metric, ...]:
    """The table itself; grouped as the dashboards are."""
    return (
        # Progress and throughput
        Metric("hermes_run_info", "gauge", "", "Always 1; the labels say what runs", ("world_size", "device", "commit")),
        Metric("hermes_step", "gauge", "", "Last finished global step"),
        Metric("hermes_max_steps", "gauge", "", "Steps of the whole training"),
        Metric("hermes_steps_total", "counter", "", "Steps finished by this process, skipped ones included"),
        Metric("hermes_last_step_timestamp_seconds", "gauge", "seconds", "Unix time at which the last step ended"),
        Metric("hermes_samples_total", "counter", "", "Samples (cropped patches of real cases) this rank trained on"),
        Metric("hermes_patches_total", "counter", "", "Patches computed by this rank, filler of uneven batches included"),
        Metric("hermes_voxels_total", "counter", "", "Voxels of the computed patches"),
        Metric(
            "hermes_flops_total", "counter", "", "Model FLOPs spent by this rank (forward and backward, without recomputation)"
        ),
        Metric("hermes_device_peak_flops", "gauge", "", "Peak FLOP/s of this rank's device: from the table, or measured"),
        Metric("hermes_mfu_ratio", "gauge", "ratio", "Model FLOPs per second over the device's peak, last step"),
        Metric("hermes_parameters", "gauge", "", "Trainable parameters of the model, all ranks' parts"),
        Metric("hermes_world_size", "gauge", "", "Ranks of this run"),
        # Step time
        Metric("hermes_step_duration_seconds", "histogram", "seconds", "Wall time of a step", (), STEP_BUCKETS_S),
        Metric(
            "hermes_step_part_seconds",
            "histogram",
            "seconds",
            "Wall time of one part of a step: data_wait, forward, backward, optimizer, communication, checkpoint",
            ("part",),
            STEP_BUCKETS_S,
        ),
        Metric(
            "hermes_busy_seconds_total",
            "counter",
            "seconds",
            "Time this rank needed itself before it waits for the others; the spread over ranks shows stragglers",
        ),
        # Learning
        Metric("hermes_loss", "gauge", "", "Loss of the last step over the global batch", ("term",)),
        Metric("hermes_dataset_loss", "gauge", "", "Loss of the last step that held this dataset", ("dataset", "term")),
        Metric("hermes_task_loss", "gauge", "", "Loss of the last step that held this class", ("dataset", "task", "term")),
        Metric("hermes_dataset_samples_total", "counter", "", "Samples drawn from this dataset by this rank", ("dataset",)),
        Metric("hermes_pairs_total", "counter", "", "(sample, task) pairs that this class was trained with", ("dataset", "task")),
        Metric(
            "hermes_foreground_pairs_total",
            "counter",
            "",
            "Those of hermes_pairs_total whose crop held a voxel of the class",
            ("dataset", "task"),
        ),
        Metric("hermes_learning_rate", "gauge", "", "Learning rate of the last step"),
        Metric("hermes_gradient_norm", "histogram", "", "Global gradient norm before clipping", (), NORM_BUCKETS),
        Metric("hermes_last_gradient_norm", "gauge", "", "Global gradient norm of the last step"),
        Metric("hermes_skipped_steps_total", "counter", "", "Steps skipped because of a NaN or Inf loss or gradient"),
        # Evaluation
        Metric("hermes_evaluating", "gauge", "", "1 while an evaluation runs and training rests, else 0"),
        Metric("hermes_dice_ratio", "gauge", "ratio", "Dice of the last evaluation", ("split", "dataset", "task")),
        Metric(
            "hermes_nsd_ratio", "gauge", "ratio", "Normalised surface Dice of the last evaluation", ("split", "dataset", "task")
        ),
        Metric(
            "hermes_hd95_meters",
            "gauge",
            "meters",
            "95 % Hausdorff distance of the last evaluation",
            ("split", "dataset", "task"),
        ),
        Metric("hermes_mean_dice_ratio", "gauge", "ratio", "Mean Dice of the last evaluation", ("split",)),
        Metric("hermes_evaluation_duration_seconds", "histogram", "seconds", "Wall time of an evaluation", (), LONG_BUCKETS_S),
        # Data path
        Metric(
            "hermes_data_stall_seconds_total",
            "counter",
            "seconds",
            "Time steps waited for samples: each step's longest wait of any rank, alike on all ranks (average over them)",
        ),
        Metric(
            "hermes_data_wait_seconds_total",
            "counter",
            "seconds",
            "Time this rank waited for samples, by what it waited for: storage, decode, augment, transfer, queue",
            ("cause",),
        ),
        Metric(
            "hermes_sample_stage_seconds_total",
            "counter",
            "seconds",
            "Worker time spent on samples, by stage (waiting or not): storage, decode, augment, transfer",
            ("stage",),
        ),
        Metric("hermes_read_bytes_total", "counter", "bytes", "Compressed bytes read for samples, from the store or its cache"),
        Metric(
            "hermes_fetched_bytes_total",
            "counter",
            "bytes",
            "Compressed bytes that came from the store itself, not from its cache",
        ),
        Metric("hermes_cache_hits_total", "counter", "", "Byte ranges that the local cache answered"),
        Metric("hermes_cache_misses_total", "counter", "", "Byte ranges that went to the store"),
        Metric("hermes_cache_used_bytes", "gauge", "bytes", "Size of the local cache"),
        Metric("hermes_storage_retries_total", "counter", "", "Repeated reads after a transient storage error", ("dataset",)),
        Metric(
            "hermes_quarantined_cases_total", "counter", "", "Corrupt cases that this process took out of training", ("dataset",)
        ),
        Metric(
            "hermes_quarantine_cases",
            "gauge",
            "",
            "Corrupt cases that are out of training now, of all ranks and from before a resume (rank 0 reports)",
            ("dataset",),
        ),
        Metric("hermes_quarantine_limit_cases", "gauge", "", "stream.faults.max_quarantined: with more the run stops"),
        Metric("hermes_substitutions_total", "counter", "", "Samples replaced by a deterministic substitute", ("dataset",)),
        Metric("hermes_stream_events_total", "counter", "", "Lines of stream.jsonl, by kind", ("kind",)),
        Metric("hermes_ready_samples", "gauge", "", "Samples ready in this rank's queue"),
        Metric("hermes_queue_limit_samples", "gauge", "", "Most samples that may be ready in advance"),
        Metric("hermes_ray_workers", "gauge", "", "Ray workers alive on this rank's cluster (one rank of it reports)"),
        Metric("hermes_ray_worker_restarts_total", "counter", "", "Ray workers that crashed or were killed; Ray starts others"),
        Metric("hermes_object_store_used_bytes", "gauge", "bytes", "Ray object store in use"),
        Metric("hermes_object_store_limit_bytes", "gauge", "bytes", "Ray object store size"),
        # Health
        Metric("hermes_memory_bytes", "gauge", "bytes", "Memory: rss, host_available, device_allocated, device_peak", ("kind",)),
        Metric("hermes_disk_free_bytes", "gauge", "bytes", "Free space where the run directory lies"),
        Metric("hermes_disk_size_bytes", "gauge", "bytes", "Size of the disk where the run directory lies"),
        Metric(
            "hermes_checkpoint_timestamp_seconds",
            "gauge",
            "seconds",
            "Unix time of the last complete checkpoint, or of the start; only where checkpoint.every_steps > 0",
        ),
        Metric("hermes_checkpoint_step", "gauge", "", "Step of the last complete checkpoint"),
        Metric("hermes_checkpoint_size_bytes", "gauge", "bytes", "Size of the last complete checkpoint, all ranks"),
        Metric(
            "hermes_checkpoint_duration_seconds",
            "histogram",
            "seconds",
            "Wall time of a checkpoint: snapshot (training stands still) or write (in the background)",
            ("phase",),
            LONG_BUCKETS_S,
        ),
        Metric("hermes_checkpoint_failures_total", "counter", "", "Checkpoints that could not be written"),
        Metric("hermes_telemetry_seconds_total", "counter", "seconds", "Time spent in telemetry itself"),
        Metric("hermes_telemetry_errors_total", "counter", "", "Pushes to the Pushgateway that failed"),
        # Scaling studies (exported by launch/sweep.py, whose run name is the sweep's)
        Metric(
            "hermes_sweep_runs", "gauge", "", "Runs of a sweep by state: waiting, running, done, diverged, failed", ("state",)
        ),
        Metric("hermes_sweep_loss", "gauge", "", "Final loss of one run of a sweep", ("member", "parameters", "samples")),
        Metric(
            "hermes_sweep_samples_per_second",
            "gauge",
            "",
            "Measured throughput of one run of a sweep",
            ("member", "ranks", "mode"),
        ),
        Metric(
            "hermes_law_value", "gauge", "", "Fitted value of a law's parameter and its interval", ("law", "parameter", "bound")
        ),
    )


METRICS: dict[str, Metric] = {row.name: row for row in _rows()}
"""Name → row."""


def table_markdown() -> str:
    """The table as it stands in the guide `docs/watch-a-run.md` (a test keeps both equal)."""
    lines = ["| metric | kind | labels besides run, rank | meaning |", "|---|---|---|---|"]
    lines += [f"| `{m.name}` | {m.kind} | {', '.join(m.labels) or '–'} | {m.help} |" for m in METRICS.values()]
    return "\n".join(lines)
