"""Faults in real files and real workers: training goes on, with the same order, and says what happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hermes_dist.config import Config
from hermes_dist.errors import QuarantineLimitError
from hermes_dist.shards.store import open_store
from hermes_dist.stream.batch import StepBatch
from hermes_dist.stream.loader import open_stream
from tests.stream.tools import make_config, real_samples, steps, write_store

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests copy before they damage it."""
    path = tmp_path_factory.mktemp("intact") / "store"
    write_store(path, request.param)
    return path


def files_of(store: Path, dataset: str, number: int) -> list[Path]:
    """Large files that hold the voxels of one case."""
    folder = next(p for p in store.iterdir() if p.is_dir() and p.name in ("zarr", "webdataset"))
    (case,) = sorted((folder / dataset).glob(f"case{number}-*"))
    found = [case] if case.is_file() else sorted(p for p in case.rglob("*") if p.is_file() and "json" not in p.name)
    assert found
    return found


def flip_bits(path: Path) -> None:
    """Flip one bit in every 64th byte: whatever is read, something is wrong in it."""
    data = bytearray(path.read_bytes())
    for i in range(7, len(data), 64):
        data[i] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped bits": flip_bits, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_case_is_replaced_from_its_dataset(damage: str, intact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(intact, store)
    for file in files_of(store, "liver", 2):
        DAMAGE[damage](file)
    config = make_config(train__max_steps=6)
    before, after = steps(config, intact), steps(config, store)
    events = [e for b in after for e in b.events]
    quarantined = [e for e in events if e["kind"] == "quarantine"]
    assert [(e["dataset"], e["case_id"]) for e in quarantined] == [("liver", "case2")]
    replaced = {e["position"]: e for e in events if e["kind"] == "substitution"}
    assert replaced
    sample_of = {x[0]: x for x in real_samples(before)}
    for sample in real_samples(after):
        assert (sample == sample_of[sample[0]]) == (sample[0] not in replaced)
    for event in replaced.values():
        assert event["case_id"] == "case2"
        assert event["substitute"].startswith("case")
        assert event["substitute"] != "case2"
        assert event["error"]
        assert event["time_s"] > 0
    ranks = [steps(config, store, r, 2) for r in range(2)]
    assert sorted(x for r in ranks for x in real_samples(r)) == sorted(real_samples(after))


def test_a_whole_dataset_lost_stops_with_names(intact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(intact, store)
    for number in range(2):
        for file in files_of(store, "heart", number):
            file.unlink()
    with pytest.raises(QuarantineLimitError, match="heart/case"):
        steps(make_config(train__max_steps=20), store)


def test_slow_storage_is_waited_for_within_the_limit(intact: Path) -> None:
    config = make_config(stream__faults={"chaos": {"slow_s": 0.05}}, train__max_steps=2, stream__wait_limit_s=30)
    slow = steps(config, intact)
    assert real_samples(slow) == real_samples(steps(make_config(train__max_steps=2), intact))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small Ray cluster for the tests below, in which every sample after the first step is read by workers."""
    ray = pytest.importorskip("ray")
    from hermes_dist.stream import ray_source
    from hermes_dist.stream.ray_cluster import quiet_ray

    quiet_ray()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_source, "READ_WHILE_STARTING", False)
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def zarr_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for the tests with Ray."""
    path = tmp_path_factory.mktemp("ray") / "store"
    write_store(path, "zarr")
    return path


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_die_cost_no_sample(cluster: None, zarr_store: Path) -> None:
    """Chaos kills the worker process (SIGKILL) at about a tenth of the samples, once each; Ray reads them again."""
    # A worker that dies costs the time to start another one, on a busy host most of a minute, and half a dozen die here.
    common: dict[str, Any] = {"train__max_steps": 10, "run__seed": 3, "stream__wait_limit_s": 900}
    killed = make_config(**common, stream__backend="ray", stream__workers=2, stream__faults={"chaos": {"kill": 0.1}})
    assert real_samples(steps(killed, zarr_store)) == real_samples(steps(make_config(**common), zarr_store))


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_no_sample(cluster: None, zarr_store: Path) -> None:
    config = make_config(
        train__max_steps=30, stream__backend="ray", stream__workers=2, stream__faults={"chaos": {"slow_s": 0.01}}
    )
    got = _kill_a_worker_at_step(config, zarr_store, 5)
    assert real_samples(got) == real_samples(steps(make_config(train__max_steps=30), zarr_store))


def _kill_a_worker_at_step(config: Config, path: Path, step: int) -> list[StepBatch]:
    """All steps of a run in which Ray's busy workers are killed once."""
    store, got = open_store(str(path)), list[StepBatch]()
    with open_stream(config, [store], store.collection.tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in stream:
            got.append(batch)
            if batch.step == step:
                workers = [p for p in psutil.Process().children(recursive=True) if "HermesPlan" in " ".join(p.cmdline())]
                for worker in workers:
                    worker.kill()
    return got


@pytest.mark.multiproc
@pytest.mark.slow
def test_errors_of_workers_arrive_as_themselves(cluster: None, zarr_store: Path) -> None:
    faults = {"chaos": {"corrupt": 1.0}, "max_quarantined": 2}
    config = make_config(stream__backend="ray", stream__workers=1, stream__faults=faults)
    with pytest.raises(QuarantineLimitError, match=r"heart/case|liver/case|brain/case"):
        steps(config, zarr_store)
