"""Two ranks of the real training command on a store with bad cases: one cap for the job, one line a case, one end for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.test_stream_faults import files_of, truncate
from tests.multiproc.ranks import start_ranks, wait_ranks
from tests.stream.tools import write_store

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.faults]


def arguments(store: Path, out: Path, name: str, cap: int) -> list[str]:
    return [
        "--config", "demo.json", f'data.stores=["{store}"]', f"run.output_dir={out}", f"run.name={name}", "run.seed=5",
        "train.max_steps=8", "train.global_batch=6", "train.micro_batch=3", "data.patch_vox_zyx=[32,32,32]",
        "stream.backend=inline", "model.base_channels=8", f"stream.faults.max_quarantined={cap}", "monitor.prometheus_port=-1",
        "checkpoint.every_steps=0", "evaluate.every_steps=0",
    ]  # fmt: skip


def quarantined(run: Path) -> list[str]:
    events = [json.loads(line) for line in (run / "stream.jsonl").read_text().splitlines()]
    return [f"{e['dataset']}/{e['case_id']}" for e in events if e["kind"] == "quarantine"]


def test_the_cap_is_the_jobs(tmp_path: Path) -> None:
    write_store(tmp_path / "store", "zarr")
    damaged = [("liver", 1), ("liver", 3), ("brain", 0)]
    for dataset, number in damaged:
        for file in files_of(tmp_path / "store", dataset, number):
            truncate(file)
    results = wait_ranks(start_ranks("launch.train", arguments(tmp_path / "store", tmp_path, "stops", 2), 2))
    for code, output in results:
        assert code == 2, "nothing restarts it: a restart would find the same cases"
        assert "unreadable cases on all ranks, more than stream.faults.max_quarantined=2" in output
        assert "hermes-shard verify" in output
    assert sorted(quarantined(tmp_path / "stops")) == sorted(f"{dataset}/case{number}" for dataset, number in damaged)
