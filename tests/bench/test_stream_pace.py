"""What Ray's scheduling loop costs the training process: CPU seconds beside a slow consumer, with and without its rests.

pytest tests/bench/test_stream_pace.py -m bench -s
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from hermes_dist.stream import ray_pace, ray_source  # noqa: E402
from hermes_dist.stream.loader import open_stream  # noqa: E402
from hermes_dist.stream.ray_cluster import quiet_ray  # noqa: E402
from tests.stream.tools import make_config, write_store  # noqa: E402

STEPS, WARM, STEP_S = 60, 10, 0.2


@pytest.fixture
def cluster() -> Iterator[None]:
    quiet_ray()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def busy_share(store_path: Path) -> float:
    """CPU seconds of this process per second, while it waits between steps as if a device computed."""
    store = write_store(store_path, "zarr")
    config = make_config(stream__backend="ray", stream__workers=1, train__max_steps=STEPS)
    begin = (0.0, 0.0)
    with open_stream(config, [store], store.collection.tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in stream:
            if batch.step == WARM:
                begin = time.process_time(), time.perf_counter()
            time.sleep(STEP_S)
            if batch.step == STEPS - WARM:  # before the pipeline has read everything
                return (time.process_time() - begin[0]) / (time.perf_counter() - begin[1])
    raise AssertionError("the stream ended early")


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_the_loop_rests(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_source, "READ_WHILE_STARTING", False)
    paced = busy_share(tmp_path / "paced")
    monkeypatch.setattr(ray_pace, "HUNGRY_PAUSE_S", 0.0)
    monkeypatch.setattr(ray_pace, "SATED_PAUSE_S", 0.0)
    spinning = busy_share(tmp_path / "spinning")
    with capsys.disabled():
        print(f"\ncores busy in the training process while it sleeps: {spinning:.2f} as Ray does, {paced:.2f} with rests")
    assert paced < 0.5 * spinning
