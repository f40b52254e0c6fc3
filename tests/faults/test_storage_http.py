"""A store behind a web server that throttles, stalls, cuts connections, lies about length or loses objects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.errors import CorruptShardError, StorageAccessError, StoreError, TransientStorageError
from hermes_dist.shards import remote
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.store import create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing
from tests.faults.range_server import RangeServer
from tests.servers import serve

pytestmark = pytest.mark.faults
TASKS = TaskTable.build([("ct", "CT", "trunk", [("liver", [1])], None)])
SHAPE = (40, 50, 70)


@pytest.fixture(params=[("zarr", Layout(32)), ("webdataset", Layout(40))], ids=["zarr", "webdataset"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RangeServer]:
    form, layout = request.param
    root = tmp_path / "store"
    writer = create_store(str(root), form, tasks=TASKS, preprocessing=Preprocessing(image_dtype="int16"), layout=layout)
    for i in range(2):
        image = np.random.default_rng(i).normal(size=SHAPE).astype(np.float32)
        label = np.zeros(SHAPE, np.uint8)
        label[10:20, 5:30, 20:40] = 1
        writer.write_case(CaseRecord("ct", f"c{i}", "CT", "train", (1.5, 1.5, 1.5), "{}", f"h{i}"), image, label)
    writer.finish()
    with serve(root) as served:
        yield served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore gives up after one retry and a second of silence, so that the tests are quick."""
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=10), "base": 2}
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=5), "backoff": backoff})
    monkeypatch.setattr(remote, "TIMEOUTS", {"timeout": timedelta(seconds=1), "connect_timeout": timedelta(seconds=1)})


def test_the_same_voxels_by_http(server: RangeServer) -> None:
    store, local = open_store(server.url), open_store(str(server.root))
    for box in (((0, 0, 0), SHAPE), ((-5, 20, 30), (30, 64, 30))):
        for ours, theirs in zip(store.read_crop(1, *box), local.read_crop(1, *box), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert server.ranges
    store.close()


def test_near_ranges_are_one_request(server: RangeServer) -> None:
    store = open_store(server.url)
    store.read_crop(0, (0, 0, 0), (20, 20, 20))
    server.ranges.clear()
    store.read_crop(0, (0, 0, 0), SHAPE)
    assert len(server.ranges) <= 2, server.ranges
    store.close()


def test_far_ranges_are_fetched_at_the_same_time(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_GAP_BYTES", 0)
    monkeypatch.setattr(remote, "MAX_JOINED_BYTES", 1)
    store, local = open_store(server.url), open_store(str(server.root))
    store.read_crop(0, (0, 0, 0), (1, 1, 1))
    server.faults = ["together"] * 3
    np.testing.assert_array_equal(store.read_case(0)[0], local.read_case(0)[0])
    assert not server.faults
    store.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "fault", ["503", "500", "429", "400 RequestTimeout", "400 ExpiredToken", "403 ExpiredToken", "stall", "reset", "cut"]
)
def test_what_may_pass_is_transient_and_passes(server: RangeServer, fault: str) -> None:
    store, local = open_store(server.url), open_store(str(server.root))
    server.faults = [fault] * 40
    began = time.monotonic()
    with pytest.raises(TransientStorageError) as error:
        store.read_crop(0, (0, 0, 0), (20, 20, 20))
    assert time.monotonic() - began < 20
    assert server.url in str(error.value)
    assert "SECRET" not in str(error.value)
    time.sleep(0 if fault != "stall" else 0.1)
    server.faults = []
    np.testing.assert_array_equal(store.read_crop(0, (0, 0, 0), (20, 20, 20))[0], local.read_crop(0, (0, 0, 0), (20, 20, 20))[0])
    store.close()


@pytest.mark.usefixtures("impatient")
def test_a_single_hiccup_is_smoothed_over(server: RangeServer) -> None:
    store = open_store(server.url)
    server.faults = ["503"]
    store.read_crop(0, (0, 0, 0), (20, 20, 20))
    store.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["403", "401", "400", "403 SignatureDoesNotMatch", "400 InvalidToken"])
def test_what_is_refused_is_neither_transient_nor_the_data_s_fault(server: RangeServer, fault: str) -> None:
    store = open_store(server.url)
    server.faults = [fault] * 40
    with pytest.raises(
        StorageAccessError, match=f"{server.url}.*{fault.split(' ')[-1]}.*credentials in the environment"
    ) as error:
        store.read_crop(0, (0, 0, 0), (20, 20, 20))
    assert "SECRET" not in str(error.value)
    store.close()


@pytest.mark.usefixtures("impatient")
def test_what_is_gone_is_missing(server: RangeServer) -> None:
    store = open_store(server.url)
    server.faults = ["410"] * 40
    with pytest.raises(StoreError, match="does not exist any more"):
        store.read_crop(0, (0, 0, 0), (20, 20, 20))
    store.close()


def test_lost_and_cut_objects(server: RangeServer) -> None:
    store = open_store(server.url)
    largest = max((p for p in server.root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    number = next(i for i in range(2) if store.manifest.row(i).uri in str(largest))
    os.truncate(largest, largest.stat().st_size // 4)
    with pytest.raises(CorruptShardError):
        store.read_case(number)
    largest.unlink()
    with pytest.raises(StoreError, match="does not exist"):
        open_store(server.url).read_case(number)
    store.read_case(1 - number)
    store.close()


def test_bits_flipped_on_the_way_are_noticed_and_asked_for_again(server: RangeServer, tmp_path: Path) -> None:
    local = open_store(str(server.root))
    plain = open_store(server.url)
    server.faults = ["flip"] * 8
    with pytest.raises(CorruptShardError):
        plain.read_case(0)
    server.faults = []
    cached = open_store(server.url, cache_dir=str(tmp_path / "cache"), cache_mib=8)
    cached.read_crop(0, (0, 0, 0), (1, 1, 1))
    server.faults = ["flip"]  # one: a second could hit the request that asks again
    np.testing.assert_array_equal(cached.read_case(0)[0], local.read_case(0)[0])
    asked = len(server.ranges)
    for _ in range(2):
        np.testing.assert_array_equal(cached.read_case(0)[0], local.read_case(0)[0])
    assert len(server.ranges) == asked, "what came damaged is not kept"
    plain.close()
    cached.close()
