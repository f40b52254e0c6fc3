"""The plan and the manifest: O(1) at any position, fast in batches, and no dearer with more cases.

pytest tests/bench/test_stream_plan.py -m bench -s
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.config import MixtureConfig, validate
from hermes_dist.shards.manifest import Manifest, write_manifest
from hermes_dist.stream.mixture import shares
from hermes_dist.stream.plan import Group, Plan, PlanRows
from hermes_dist.stream.prepare import build_reader
from tests.bench import stream_data
from tests.bench.test_shards_manifest import entries

pytestmark = pytest.mark.bench
SIZES = (195, 26, 7, 100_000, 40)
SIDE = 64
"""Of the cheapest samples that test_stream_throughput.py compares."""


def cpu_ms(call: Callable[[int], object], count: int) -> float:
    """Median CPU milliseconds of a call."""
    times: list[float] = []
    for i in range(count):
        begin = time.process_time()
        call(i)
        times.append(time.process_time() - begin)
    return float(np.median(times)) * 1e3


def make_plan(sizes: tuple[int, ...]) -> Plan:
    first = np.cumsum([0, *sizes])
    groups = [Group(f"d{i}", i, np.arange(n) + first[i]) for i, n in enumerate(sizes)]
    return Plan(1, groups, shares([g.name for g in groups], sizes, MixtureConfig()))


def test_any_position_costs_the_same() -> None:
    plan = make_plan(SIZES)
    near, far = (cpu_ms(lambda i, at=at: plan.rows(at + i, at + i + 1), 300) for at in (10, 10**9))
    begin = time.process_time()
    plan.rows(10**9, 10**9 + 200_000)
    rate = 200_000 / (time.process_time() - begin)
    print(f"\none position: {near:.2f} CPU ms at 10, {far:.2f} at 10⁹; {rate:,.0f} positions a CPU second in batches")
    assert far <= 1.5 * near
    assert rate >= 100_000


def test_a_sample_costs_the_same_in_a_large_collection(tmp_path: Path) -> None:
    """Plan, manifest row and foreground of random cases, 10 cases against 100,000: within a tenth of a whole sample of 64³."""
    sample_ms = whole_sample_ms(tmp_path)
    cost: dict[int, float] = {}
    for count in (10, 100_000):
        path = tmp_path / f"{count}.parquet"
        write_manifest(entries(count), str(path))
        manifest, plan = Manifest(str(path)), make_plan((count,))
        rows = plan.rows(0, 64 * 400)

        def one(i: int, rows: PlanRows = rows, manifest: Manifest = manifest) -> None:
            case = int(rows.case[i])
            manifest.row(case)
            manifest.foreground_counts(case)
            manifest.foreground(case, 1)

        for i in range(2000):  # a collection is decoded once, in the first pass over it
            one(i)
        cost[count] = cpu_ms(lambda i, plan=plan: plan.rows(64 * i, 64 * i + 64), 50) / 64 + cpu_ms(lambda i: one(2000 + i), 400)
    added = cost[100_000] - cost[10]
    print(
        f"\nplan, row and foreground: {cost[10]:.2f} CPU ms a sample with 10 cases, {cost[100_000]:.2f} with 100,000: "
        f"{added / sample_ms:.1%} of the {sample_ms:.1f} ms of a whole sample of {SIDE}³"
    )
    assert added <= 0.1 * sample_ms


def whole_sample_ms(folder: Path) -> float:
    """CPU milliseconds of a sample of a few cases, read and augmented with the published ranges; the mean of 200 warm ones."""
    cases = [stream_data.scan(i, stream_data.SIDES["small"]) for i in range(stream_data.CASES)]
    store = stream_data.write_store(folder / "store", cases)
    config = validate({"data": {"patch_vox_zyx": (SIDE,) * 3}, "stream": {"backend": "inline"}})
    reader, _ = build_reader(config, [store], store.collection.tasks)
    rows = reader.plan.rows(0, 4096)
    for i in range(40):
        reader.read(rows, i)
    begin = time.process_time()
    for i in range(40, 240):
        reader.read(rows, i)
    return (time.process_time() - begin) / 200 * 1e3
