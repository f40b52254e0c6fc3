"""Samples per CPU-second with the paper's augmentation: this loader against MONAI's, in one run, one thread.

pytest tests/bench/test_stream_throughput.py -m bench -s
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.config import Config, validate
from hermes_dist.shards.store import ShardStore
from hermes_dist.stream.batch import Collator
from hermes_dist.stream.plan import Group, Plan
from hermes_dist.stream.prepare import build_reader
from tests.bench import peer_monai, stream_data

pytestmark = [pytest.mark.bench, pytest.mark.slow]

TARGET = 3.0
N = {64: 64, 96: 32, 128: 24}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardStore]:
    """One store per volume size."""
    root = tmp_path_factory.mktemp("bench")
    return {name: stream_data.write_store(root / name, sides) for name, sides in stream_data.SIDES.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """CPU time of one thread is what is compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(side: int, **augment: Any) -> Config:
    return validate({"data": {"patch_vox_zyx": (side,) * 3}, "stream": {"backend": "inline"}, "augment": augment})


def ours(store: ShardStore, side: int, **augment: Any) -> Callable[[int], Any]:
    """Read, augment and collate the sample of one position."""
    config = make_config(side, **augment)
    reader, _ = build_reader(config, [store], store.collection.tasks)
    collator = Collator(store.collection.tasks, config.data.patch_vox_zyx)
    rows = reader.plan.rows(0, 4096)
    return lambda i: collator.collate([reader.read(rows, i)])


def per_cpu_second(sample: Callable[[int], Any], count: int) -> float:
    """Samples per second of CPU time, after a warm-up of a quarter of the count."""
    for i in range(count // 4):
        sample(i)
    begin = time.process_time()
    for i in range(count // 4, count // 4 + count):
        sample(i)
    return count / (time.process_time() - begin)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("side", [64, 96, 128])
def test_against_monai(side: int, size: str, stores: dict[str, ShardStore], tmp_path: Path) -> None:
    cases = [stream_data.scan(i, stream_data.SIDES[size]) for i in range(stream_data.CASES)]
    patch = (side, side, side)
    mine = per_cpu_second(ours(stores[size], side), N[side])
    cache, persistent = (
        per_cpu_second(peer_monai.open_loader(kind, cases, patch, tmp_path), N[side]) for kind in ("cache", "persistent")
    )
    print(
        f"\n{size} volumes, {side}³: hermes {mine:.1f} samples/CPU-s, MONAI CacheDataset {cache:.1f} ({mine / cache:.1f}×), "
        f"PersistentDataset {persistent:.1f} ({mine / persistent:.1f}×)"
    )
    assert mine >= TARGET * persistent
    assert mine >= TARGET * cache


def test_where_the_time_goes(stores: dict[str, ShardStore]) -> None:
    """Reading alone, spatial alone, intensity alone; for the page of results."""
    for side in (64, 96, 128):
        parts = {
            "crop only": ours(stores["large"], side, enabled=False),
            "affine always": ours(stores["large"], side, spatial_probability=1, intensity_probability=0),
            "intensity always": ours(stores["large"], side, spatial_probability=0, intensity_probability=1),
            "as trained": ours(stores["large"], side),
        }
        times = {name: 1e3 / per_cpu_second(sample, N[side] // 2) for name, sample in parts.items()}
        print(f"\n{side}³ from 12.5 Mvoxel, CPU ms a sample: " + ", ".join(f"{k} {v:.1f}" for k, v in times.items()))
        assert all(np.isfinite(list(times.values())))


def test_cost_does_not_grow_with_the_collection(stores: dict[str, ShardStore]) -> None:
    """CPU time of planning and locating a sample, 10 cases against 100,000 (within 10 % of a whole sample's time)."""
    sample_s = 1 / per_cpu_second(ours(stores["small"], 96), 32)

    def plan_s(cases: int) -> float:
        groups = [Group("many", 0, np.arange(cases)), Group("few", 1, np.arange(10) + cases)]
        plan = Plan(0, groups, np.array([0.5, 0.5]))
        begin = time.process_time()
        for i in range(0, 4000, 4):
            plan.rows(i, i + 4)
        return (time.process_time() - begin) / 4000

    small, large = plan_s(10), plan_s(100_000)
    print(
        f"\nplan: {small * 1e6:.0f} µs a sample with 10 cases, {large * 1e6:.0f} with 100,000; a sample {sample_s * 1e3:.1f} ms"
    )
    assert large - small <= 0.1 * sample_s
