"""Samples per CPU-second with augmentation: this loader against nnU-Net v2's and MONAI's, in one run, one thread, side by side.

pytest tests/bench/test_stream_throughput.py -m bench -s

nnU-Net is compared where it is installed; its loader runs with its own default training augmentation, MONAI's and ours with the
list of the paper. Loaders take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.config import Config, validate
from hermes_dist.shards.store import ShardStore
from hermes_dist.stream.batch import Collator
from hermes_dist.stream.prepare import build_reader
from tests.bench import peer_monai, stream_data

try:
    from tests.bench import peer_nnunet
except ImportError:
    peer_nnunet = None

pytestmark = [pytest.mark.bench, pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

TARGET = 3.0
TURNS = 4
N = {64: 24, 96: 12, 128: 8}
"""Samples in a turn."""
Scans = Sequence[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module", params=["small", "large"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Scans, ShardStore]:
    """Name, cases and store of one volume size."""
    cases = [stream_data.scan(i, stream_data.SIDES[request.param]) for i in range(stream_data.CASES)]
    return request.param, cases, stream_data.write_store(tmp_path_factory.mktemp("bench") / "store", cases)


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


def per_cpu_second(loaders: dict[str, tuple[Callable[[int], Any], int]], count: int) -> dict[str, float]:
    """Samples per second of CPU time. A loader is (function of the call's number, samples a call); the first turn warms up."""
    spent = dict.fromkeys(loaders, 0.0)
    for turn in range(TURNS + 1):
        for name, (load, size) in loaders.items():
            calls = count // size
            begin = time.process_time()
            for i in range(turn * calls, (turn + 1) * calls):
                load(i)
            spent[name] += time.process_time() - begin if turn else 0.0
    return {name: TURNS * (count // size) * size / spent[name] for name, (_, size) in loaders.items()}


def peers(cases: Scans, patch: tuple[int, int, int], folder: Path) -> dict[str, tuple[Callable[[int], Any], int]]:
    """The other loaders on the same scans."""
    found = {
        f"MONAI {kind}": (peer_monai.open_loader(kind, cases, patch, folder / kind), 1)
        for kind in ("CacheDataset", "PersistentDataset")
    }
    if peer_nnunet is not None:
        found["nnU-Net v2"] = (peer_nnunet.open_loader(cases, patch, folder / "nnunet"), peer_nnunet.BATCH)
    return found


def report(title: str, rates: dict[str, float]) -> None:
    mine = rates["ours"]
    print(f"\n{title}, samples per CPU-second: " + ", ".join(f"{k} {v:.2f} ({mine / v:.1f}×)" for k, v in rates.items()))


@pytest.mark.parametrize("side", [64, 96, 128])
def test_against_peers(side: int, data: tuple[str, Scans, ShardStore], tmp_path: Path) -> None:
    name, cases, store = data
    rates = per_cpu_second({"ours": (ours(store, side), 1), **peers(cases, (side,) * 3, tmp_path)}, N[side])
    report(f"{name} volumes, {side}³", rates)
    assert all(rates["ours"] >= TARGET * rate for peer, rate in rates.items() if peer != "ours"), rates


def test_many_labels(tmp_path: Path) -> None:
    """61 labels, 96³: nnU-Net interpolates the label map once per label."""
    cases = [stream_data.scan(i, stream_data.SIDES["small"], classes=61) for i in range(2)]
    store = stream_data.write_store(tmp_path / "store", cases, classes=61)
    rates = per_cpu_second({"ours": (ours(store, 96), 1), **peers(cases, (96,) * 3, tmp_path)}, 4)
    report("61 labels, 96³", rates)
    assert all(rates["ours"] >= TARGET * rate for peer, rate in rates.items() if peer != "ours"), rates


def test_where_the_time_goes(data: tuple[str, Scans, ShardStore]) -> None:
    """Reading alone, spatial alone, intensity alone; for the page of results."""
    name, _, store = data
    for side in (64, 96, 128):
        parts = {
            "crop only": ours(store, side, enabled=False),
            "affine always": ours(store, side, spatial_probability=1, intensity_probability=0),
            "intensity always": ours(store, side, spatial_probability=0, intensity_probability=1),
            "as trained": ours(store, side),
        }
        rates = per_cpu_second({part: (load, 1) for part, load in parts.items()}, N[side])
        print(f"\n{name} volumes, {side}³, CPU ms a sample: " + ", ".join(f"{k} {1e3 / v:.1f}" for k, v in rates.items()))
