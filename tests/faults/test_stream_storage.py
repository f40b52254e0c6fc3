"""An S3 endpoint that throttles, stalls, loses and cuts objects, and a full local disk, seen through the stream."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.config import Config
from hermes_dist.errors import StorageAccessError, StreamError
from hermes_dist.shards import remote
from hermes_dist.shards.cache import DiskCache
from hermes_dist.shards.store import ShardStore, open_store
from hermes_dist.stream.batch import StepBatch
from hermes_dist.stream.loader import open_stream
from tests.faults.range_server import RangeServer
from tests.faults.test_stream_faults import files_of, truncate
from tests.stream.tools import make_config, real_samples, steps, write_store

pytestmark = pytest.mark.faults
URL = "s3://shards/store"
PATIENT = {"retries": 8, "backoff_s": 0.01}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests copy into the bucket."""
    path = tmp_path_factory.mktemp("intact") / "store"
    write_store(path, "zarr")
    return path


@pytest.fixture
def bucket(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """An endpoint that speaks as much of S3 as reading needs, with the store in its bucket `shards`; a quick-tempered client."""
    shutil.copytree(intact, tmp_path / "bucket" / "shards" / "store")
    server = RangeServer(tmp_path / "bucket")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("ACCESS_KEY_ID", "id"),
        ("SECRET_ACCESS_KEY", "key"),
        ("REGION", "us-east-1"),
        ("ENDPOINT_URL", server.url),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=10), "base": 2}
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=5), "backoff": backoff})
    monkeypatch.setattr(remote, "TIMEOUTS", {"timeout": timedelta(seconds=1), "connect_timeout": timedelta(seconds=1)})
    yield server
    server.shutdown()
    server.server_close()


def read(config: Config, store: ShardStore) -> list[StepBatch]:
    """All steps of a stream of one rank."""
    with open_stream(config, [store], store.collection.tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        return list(stream)


def events(batches: list[StepBatch], kind: str) -> list[dict[str, Any]]:
    return [e for b in batches for e in b.events if e["kind"] == kind]


@pytest.mark.parametrize(
    ("fault", "requests"), [("slow down", 9), ("400 ExpiredToken", 5), ("500", 9), ("stall", 6), ("reset", 9), ("cut", 9)]
)
def test_an_endpoint_that_fails_for_a_while_changes_nothing(fault: str, requests: int, bucket: RangeServer, intact: Path) -> None:
    config = make_config(stream__faults=PATIENT, train__max_steps=2)
    store = open_store(URL)
    bucket.faults = [fault] * requests
    got = read(config, store)
    assert real_samples(got) == real_samples(steps(config, intact))
    assert not bucket.faults
    retries = events(got, "retry")
    assert retries
    assert all(e["case_id"].startswith("case") and "s3://shards/store" in e["error"] and e["pause_s"] > 0 for e in retries)
    assert not events(got, "substitution")
    store.close()


def test_an_endpoint_that_fails_for_good_stops_the_run_and_names_the_case(bucket: RangeServer) -> None:
    store = open_store(URL)
    bucket.faults = ["slow down"] * 10_000
    with pytest.raises(StreamError, match=r"/case\d: storage failed 3 times.*s3://shards/store/.*stream\.faults\.retries"):
        read(make_config(stream__faults={"retries": 2, "backoff_s": 0.01}), store)
    store.close()


@pytest.mark.parametrize("fault", ["403 AccessDenied", "400 InvalidToken"])
def test_an_endpoint_that_refuses_stops_the_run_at_once(fault: str, bucket: RangeServer) -> None:
    """A replaced sample would change the order, and say that the data are damaged."""
    store = open_store(URL)
    bucket.faults = [fault] * 10_000
    with pytest.raises(StorageAccessError, match=r"s3://shards/store/.*credentials in the environment"):
        read(make_config(stream__faults={"retries": 2, "backoff_s": 0.01}), store)
    assert len(bucket.faults) > 9_900
    store.close()


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_object_is_replaced_as_a_damaged_file_is(
    damage: Any, bucket: RangeServer, intact: Path, tmp_path: Path
) -> None:
    copies = {"remote": bucket.root / "shards" / "store", "local": tmp_path / "local"}
    shutil.copytree(intact, copies["local"])
    for copy in copies.values():
        for file in files_of(copy, "liver", 2):
            damage(file)
    config = make_config(train__max_steps=6)
    store = open_store(URL)
    far, near = read(config, store), steps(config, copies["local"])
    assert real_samples(far) == real_samples(near)
    names = [[(e["position"], e["case_id"], e["substitute"]) for e in events(b, "substitution")] for b in (far, near)]
    assert names[0] == names[1] != []
    assert [(e["dataset"], e["case_id"]) for e in events(far, "quarantine")] == [("liver", "case2")]
    store.close()


def test_bits_flipped_on_the_way_are_asked_for_again(bucket: RangeServer, intact: Path) -> None:
    """What is stored is sound: a replaced sample would make the order depend on the network."""
    config = make_config(train__max_steps=2)
    store = open_store(URL)
    store.read_crop(0, (0, 0, 0), (1, 1, 1))
    bucket.faults = ["", "flip"]
    got = read(config, store)
    assert real_samples(got) == real_samples(steps(config, intact))
    assert not events(got, "substitution")
    store.close()


def test_a_full_disk_costs_the_cache_but_no_sample(bucket: RangeServer, intact: Path, tmp_path: Path) -> None:
    """The kernel refuses every write beyond 4 KiB, as a full disk does."""
    config = make_config(train__max_steps=2)
    store = open_store(URL, cache_dir=str(tmp_path / "cache"), cache_mib=64)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        got = read(config, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert real_samples(got) == real_samples(steps(config, intact))
    assert DiskCache(tmp_path / "cache", 64 << 20).used_bytes() < store.counters.bytes_read
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    again = read(config, store)
    assert real_samples(again) == real_samples(got)
    assert store.counters.cache_misses > 0
    store.close()


def test_workers_of_a_host_share_the_cache(bucket: RangeServer, intact: Path, tmp_path: Path) -> None:
    """What one process fetched another finds; the endpoint can go away for what is cached."""
    config = make_config(train__max_steps=2)
    first, second = (open_store(URL, cache_dir=str(tmp_path / "cache"), cache_mib=64) for _ in range(2))
    got = read(config, first)
    asked = len(bucket.ranges)
    assert real_samples(read(config, second)) == real_samples(got)
    assert len(bucket.ranges) - asked <= 2 * len(first.manifest), "only the indices of the shards were asked for again"
    assert second.counters.cache_hits > 0
    first.close()
    second.close()
