"""*Data path*: do the ranks wait for samples, what for, and which data is bad?"""

from __future__ import annotations

from monitoring.dashboards.panels import BYTES, BYTES_PER_S, DATASET, RANK, RUN, SECONDS, SHARE, WINDOW, Board, PanelSpec

_SAMPLES = f"sum by (run) (rate(hermes_samples_total{{{RANK}}}[{WINDOW}]))"
_HITS = f"sum by (run) (rate(hermes_cache_hits_total{{{RANK}}}[{WINDOW}]))"
_MISSES = f"sum by (run) (rate(hermes_cache_misses_total{{{RANK}}}[{WINDOW}]))"

_WAIT = (
    PanelSpec(
        "Data wait by rank",
        (
            (
                f'rate(hermes_step_part_seconds_sum{{{RANK},part="data_wait"}}[{WINDOW}]) / ignoring (part) '
                f"rate(hermes_step_duration_seconds_sum{{{RANK}}}[{WINDOW}])",
                "rank {{rank}} {{run}}",
            ),
        ),
        "Each rank's own wait as a share of the step time; what steps lose is `Data wait` in Run overview, for a step waits for "
        "the one rank that lacks its sample. All ranks alike: the data path is too slow, or single reads fail or take long. One "
        "rank alone: its host's disk, network or CPU.",
        SHARE,
    ),
    PanelSpec(
        "What the ranks wait for",
        ((f"sum by (cause) (rate(hermes_data_wait_seconds_total{{{RANK}}}[{WINDOW}]))", "{{cause}}"),),
        "Seconds of waiting per second. storage: cache or a nearer store; decode: lz4 shards, more workers; augment: more "
        "workers or augment.where=device; "
        "queue: raise stream.prefetch.",
        SECONDS,
        "stack",
    ),
    PanelSpec(
        "Worker time per sample",
        (
            (
                f"sum by (stage) (rate(hermes_sample_stage_seconds_total{{{RANK}}}[{WINDOW}])) / on () group_left () sum "
                f"(rate(hermes_samples_total{{{RANK}}}[{WINDOW}]))",
                "{{stage}}",
            ),
        ),
        "Seconds of worker time each sample costs. The sum × samples per second = the busy workers; add stream.workers when "
        "that is near their number.",
        SECONDS,
        "stack",
    ),
)

_SUPPLY = (
    PanelSpec(
        "Samples ready",
        (
            (f"hermes_ready_samples{{{RANK}}}", "rank {{rank}} {{run}}"),
            (f"max by (run) (hermes_queue_limit_samples{{{RANK}}})", "limit {{run}}"),
        ),
        "At the limit: the data path is ahead, good. At 0: ranks wait; see what for above.",
    ),
    PanelSpec(
        "Ray workers",
        (
            (f"sum by (run) (hermes_ray_workers{{{RANK}}})", "alive {{run}}"),
            (f"sum by (run) (increase(hermes_ray_worker_restarts_total{{{RANK}}}[{WINDOW}]))", "restarts {{run}}"),
        ),
        "Restarts that repeat: workers are killed, mostly for memory; lower stream.prefetch or the patch, or look into Ray's "
        "logs. Empty with the inline backend.",
        quiet=True,
    ),
    PanelSpec(
        "Object store",
        (
            (f"max by (run) (hermes_object_store_used_bytes{{{RANK}}})", "used {{run}}"),
            (f"max by (run) (hermes_object_store_limit_bytes{{{RANK}}})", "limit {{run}}"),
        ),
        "Used near the limit makes Ray spill to disk: raise stream.object_store_mib or lower stream.prefetch. Empty with the "
        "inline backend.",
        BYTES,
        quiet=True,
    ),
    PanelSpec(
        "Bytes from storage",
        ((f"sum by (run) (rate(hermes_fetched_bytes_total{{{RANK}}}[{WINDOW}]))", "{{run}}"),),
        "All ranks, without what the local cache answered. Near the storage's or network's limit: larger cache, or shards with "
        "stronger compression.",
        BYTES_PER_S,
    ),
    PanelSpec(
        "Cache hits",
        ((f"{_HITS} / ({_HITS} + {_MISSES})", "{{run}}"),),
        "Share of reads answered by the local cache. Low after the first epoch: stream.cache_mib is smaller than what this "
        "host reads. Empty without a cache.",
        SHARE,
        quiet=True,
    ),
    PanelSpec(
        "Bytes read per sample",
        ((f"sum by (run) (rate(hermes_read_bytes_total{{{RANK}}}[{WINDOW}])) / {_SAMPLES}", "{{run}}"),),
        "From storage or the cache. Much more than patch voxels × bytes per voxel: chunks are too large for the patch; convert "
        "with smaller chunks.",
        BYTES,
    ),
)

_FAULTS = (
    PanelSpec(
        "Quarantined cases",
        (
            (f'max by (run, dataset) (hermes_quarantine_cases{{{RUN},dataset=~"$dataset"}})', "{{dataset}} {{run}}"),
            (f"max by (run) (hermes_quarantine_limit_cases{{{RUN}}})", "limit {{run}}"),
        ),
        "Corrupt cases that are out of training, by dataset, those from before a resume too; stream.jsonl names them. Any: run "
        "`hermes-shard verify`, convert these cases again. With more in all than the limit (stream.faults.max_quarantined) the "
        "run stops.",
    ),
    PanelSpec(
        "Retries",
        ((f"sum by (run, dataset) (rate(hermes_storage_retries_total{{{DATASET}}}[{WINDOW}]))", "{{dataset}} {{run}}"),),
        "Repeated reads per second after transient storage errors. Steady: the store throttles; read less at once or use a "
        "cache.",
        quiet=True,
    ),
    PanelSpec(
        "Substituted samples",
        ((f"sum by (run, dataset) (rate(hermes_substitutions_total{{{DATASET}}}[{WINDOW}]))", "{{dataset}} {{run}}"),),
        "Samples per second that stand in for quarantined cases. A large share of a dataset: its shards are damaged, stop and "
        "repair.",
        quiet=True,
    ),
    PanelSpec(
        "Stream events",
        ((f"sum by (kind) (increase(hermes_stream_events_total{{{RANK}}}[{WINDOW}]))", "{{kind}}"),),
        "Lines of stream.jsonl by kind. Read the file of the run for what happened, where and when.",
        width=16,
        quiet=True,
    ),
    PanelSpec(
        "Disk free",
        ((f"min by (run) (hermes_disk_free_bytes{{{RUN}}} / hermes_disk_size_bytes{{{RUN}}})", "{{run}}"),),
        "Where the run directory lies. Below 10 %: lower checkpoint.keep, or move the cache (stream.cache_dir).",
        SHARE,
    ),
)

BOARD = Board(
    "hermes-data",
    "Hermes · Data path",
    "Do the ranks wait for samples, what for, and which data is bad?",
    (("Waiting", _WAIT), ("Supply", _SUPPLY), ("Faults", _FAULTS)),
    ("rank", "dataset"),
)
