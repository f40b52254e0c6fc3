"""What Ray costs: CPU time of a sample read by a Ray worker against one read in the training process, and the first batch.

CPU time is that of all processes of the private cluster and of this one, between two steps of a warm stream, so Ray's own
scheduling, its daemons and the way through the object store are in it. Both backends take turns over the same positions.
pytest tests/bench/test_stream_ray.py -m bench -s
"""

from __future__ import annotations

import time
from collections import Counter

import psutil
import pytest

from hermes_dist.config import Config, validate
from hermes_dist.shards.store import ShardStore
from hermes_dist.stream import ray_source
from hermes_dist.stream.loader import open_stream
from tests.bench import stream_data

pytestmark = [pytest.mark.bench, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(900)]

SIDE, BATCH, WARM_STEPS, STEPS = 96, 4, 40, 60
ALLOWED = 1.25
FIRST_BATCH_S = 10.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    cases = [stream_data.scan(i, stream_data.SIDES["large"]) for i in range(3)]
    return stream_data.write_store(tmp_path_factory.mktemp("bench") / "store", cases)


def make_config(backend: str) -> Config:
    return validate(
        {
            "data": {"patch_vox_zyx": (SIDE,) * 3},
            "stream": {"backend": backend, "workers": 1, "prefetch": 8},
            "train": {"global_batch": BATCH, "max_steps": WARM_STEPS + STEPS},
        }
    )


def cpu_s() -> Counter[str]:
    """CPU time so far of this process and of all below it, by what they are: training, worker, raylet, other."""
    spent = Counter({"training": time.process_time()})
    for process in psutil.Process().children(recursive=True):
        try:
            times, name = process.cpu_times(), process.name()
        except psutil.Error:
            continue
        spent["worker" if name.startswith("ray::") else name if name == "raylet" else "other"] += times.user + times.system
    return spent


def measure(config: Config, store: ShardStore) -> tuple[dict[str, float], float, float]:
    """(CPU ms a sample by process, wall ms a sample, seconds from opening to the first batch)."""
    opened = time.perf_counter()
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        first_s, begin, before = 0.0, 0.0, Counter[str]()
        for batch in stream:
            if batch.step == 0:
                first_s = time.perf_counter() - opened
            if batch.step == WARM_STEPS - 1:
                begin, before = time.perf_counter(), cpu_s()
        wall_s, spent = time.perf_counter() - begin, cpu_s()
    ms = 1e3 / (STEPS * BATCH)
    return {name: (spent[name] - before[name]) * ms for name in sorted(spent)}, wall_s * ms, first_s


def test_rays_own_share(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    inline, _, _ = measure(make_config("inline"), store)
    _, _, first_s = measure(make_config("ray"), store)  # as in a run: this process reads until Ray has started
    monkeypatch.setattr(ray_source, "READ_WHILE_STARTING", False)
    split, wall_ms, _ = measure(make_config("ray"), store)
    again, _, _ = measure(make_config("inline"), store)
    inline_ms, ray_ms = (sum(inline.values()) + sum(again.values())) / 2, sum(split.values())
    print(
        f"\n{SIDE}³, CPU ms a sample: inline {inline_ms:.1f}, ray {ray_ms:.1f} ({ray_ms / inline_ms:.2f}×; wall {wall_ms:.1f}): "
        + ", ".join(f"{name} {value:.1f}" for name, value in split.items())
        + f"; first batch with ray after {first_s:.1f} s"
    )
    assert first_s <= FIRST_BATCH_S
    assert ray_ms <= ALLOWED * inline_ms
