"""The ray source against the inline source, clusters shared by ranks, and what is left when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray")

from hermes_dist.stream import ray_source  # noqa: E402
from hermes_dist.stream.ray_cluster import quiet_ray  # noqa: E402
from tests.stream.tools import config_data, make_config, real_samples, steps, write_both  # noqa: E402

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

RANK_PROGRAM = """
import hashlib, json, os, sys, time
from hermes_dist.config import validate
from hermes_dist.shards.store import open_store
from hermes_dist.stream import ray_source
from hermes_dist.stream.loader import open_stream

ray_source.READ_WHILE_STARTING = False
if __name__ == "__main__":
    config, path, rank, world = validate(json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    store, began, digests = open_store(path), time.monotonic(), {}
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=rank, world_size=world, start_step=0, telemetry=None) as stream:
        for batch in stream:
            images = [b.image[i] for b in batch.micro_batches for i in range(len(b.image)) if b.pair_mask[i].any()]
            for position, image in zip(batch.positions, images, strict=True):
                digests[int(position)] = hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest()
            print(json.dumps({"step": batch.step, "pid": os.getpid(), "s": time.monotonic() - began}), flush=True)
    print(json.dumps({"digests": digests}), flush=True)
"""


STORE_PROGRAM = """
import json, sys, time
from pathlib import Path
import ray
from hermes_dist.config import validate
from hermes_dist.shards.store import open_store
from hermes_dist.stream import ray_source
from hermes_dist.stream.loader import open_stream
from hermes_dist.stream.ray_gauges import ask

ray_source.READ_WHILE_STARTING = False
if __name__ == "__main__":
    config, store, used, limit = validate(json.loads(sys.argv[1])), open_store(sys.argv[2]), [], 0.0
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in stream:
            time.sleep(0.2)  # slower than the workers: whatever may pile up does
            if not ray.is_initialized():
                continue
            seen = ask()
            used.append(seen["hermes_object_store_used_bytes"])
            limit = seen["hermes_object_store_limit_bytes"]
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        spilled = [str(p) for p in session.rglob("ray_spilled_objects*/*")]
    print(json.dumps({"used": used, "limit": limit, "spilled": spilled}), flush=True)
"""


HANGING_PROGRAM = """
import contextlib, json, queue, signal, sys
import psutil
from hermes_dist.config import validate
from hermes_dist.shards.store import open_store
from hermes_dist.stream import loader, ray_source
from hermes_dist.stream.loader import open_stream

ray_source.READ_WHILE_STARTING = False
loader.FEEDER_LIMIT_S = 4.0
if __name__ == "__main__":
    sys.stderr = sys.stdout
    config, store = validate(json.loads(sys.argv[1])), open_store(sys.argv[2])
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in stream:
            workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
            if batch.step >= 3 and workers:
                break
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        with contextlib.suppress(queue.Empty):  # what is ready is taken, then the feeder waits
            while stream._thread.is_alive():
                stream._ready.get(timeout=5)
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of the collection per format."""
    return write_both(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small cluster that the tests of this file share where they need none of their own."""
    quiet_ray()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def run_ranks(program: Path, data: dict[str, Any], store: Path, world: int) -> list[subprocess.Popen[str]]:
    """Start the ranks of one host as separate processes."""
    env = {**os.environ, "MASTER_PORT": str(os.getpid()), "LOCAL_WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, str(program), json.dumps(data), str(store), str(rank), str(world)],
            env={**env, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ray_processes(since: float) -> list[psutil.Process]:
    """Processes of Ray that started after `since`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["name", "cmdline", "create_time"]):
        text = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.info["create_time"] >= since and ("/ray/" in text or text.startswith("ray::")) and "pytest" not in text:
            found.append(process)
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The rank's program as a file."""
    path = tmp_path / "rank.py"
    path.write_text(RANK_PROGRAM)
    return path


@pytest.mark.parametrize(
    ("form", "workers", "micro", "where"),
    [("zarr", 1, 2, "worker"), ("webdataset", 4, 3, "worker"), ("zarr", 3, 1, "device")],
)
def test_ray_and_inline_give_the_same_bits(
    form: str, workers: int, micro: int, where: str, cluster: None, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several pipelines (segments are made short), with repeated segments, formats, workers and micro-batches."""
    monkeypatch.setattr(ray_source, "READ_WHILE_STARTING", False)
    monkeypatch.setattr(ray_source, "FIRST_SEGMENT_ROWS", 9)
    monkeypatch.setattr(ray_source, "SEGMENT_ROWS", 14)
    common = {"train__max_steps": 10, "augment__where": where}
    inline = make_config(**common)
    config = make_config(**common, train__micro_batch=micro, stream__backend="ray", stream__workers=workers)
    assert real_samples(steps(config, stores[form])) == real_samples(steps(inline, stores["zarr"]))
    some = real_samples(steps(config, stores[form], rank=1, world=4, start=5))
    assert some == real_samples(steps(inline, stores["zarr"], rank=1, world=4, start=5))


def test_training_does_not_wait_for_ray_to_start(cluster: None, stores: dict[str, Path]) -> None:
    """While Ray starts the rank reads for itself; the samples are the same, and Ray takes over."""
    inline = make_config(train__max_steps=12)
    bridged = make_config(train__max_steps=12, stream__backend="ray", stream__faults={"chaos": {"slow_s": 0.05}})
    assert real_samples(steps(bridged, stores["zarr"])) == real_samples(steps(inline, stores["zarr"]))


def test_the_object_store_stays_within_its_limit(tmp_path: Path, stores: dict[str, Path]) -> None:
    """A consumer that is slower than its workers, samples of 5.3 MB, a store of 100 MiB: it is not filled, nothing is spilled."""
    program = tmp_path / "rank.py"
    program.write_text(STORE_PROGRAM)
    data = config_data(stream__backend="ray", stream__workers=2, data__patch_vox_zyx=(96, 96, 96), train__max_steps=20)
    (process,) = run_ranks(program, data, stores["zarr"], world=1)
    seen = json.loads(process.communicate(timeout=200)[0].splitlines()[-1])
    assert process.returncode == 0
    assert seen["limit"] == 100 << 20
    assert max(seen["used"]) > 5_000_000  # samples did wait there
    assert max(seen["used"]) <= 0.75 * seen["limit"]  # half for what is finished, and what the workers are about to finish
    assert not seen["spilled"]


def test_ranks_share_a_cluster_and_leave_nothing(program: Path, stores: dict[str, Path]) -> None:
    began = time.time() - 1
    processes = run_ranks(program, config_data(stream__backend="ray", train__max_steps=10), stores["zarr"], world=2)
    outputs = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    digests = [json.loads(o.splitlines()[-1])["digests"] for o in outputs]
    assert sorted(int(k) for d in digests for k in d) == list(range(60))
    (alone,) = run_ranks(program, config_data(train__max_steps=10), stores["zarr"], world=1)
    whole = json.loads(alone.communicate(timeout=100)[0].splitlines()[-1])["digests"]
    assert {**digests[0], **digests[1]} == whole
    assert_gone(began)


@pytest.mark.faults
def test_nothing_survives_a_killed_rank(program: Path, stores: dict[str, Path]) -> None:
    began = time.time() - 1
    (process,) = run_ranks(program, config_data(stream__backend="ray", train__max_steps=100_000), stores["zarr"], world=1)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["step"] >= 3:
            break
    found = ray_processes(began)
    assert found
    # What it is sent it runs: nobody on the network may reach it.
    listening = {
        c.laddr.ip.removeprefix("::ffff:")
        for p in found
        if p.is_running()
        for c in p.net_connections("inet")
        if c.status == "LISTEN"
    }
    assert listening
    assert listening <= {"127.0.0.1", "::1"}
    # A signal to the rank's group (Slurm, torchrun) must not reach them.
    assert os.getpgid(process.pid) not in {os.getpgid(p.pid) for p in found if p.is_running()}
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert_gone(began)


def test_workers_that_hang_do_not_hold_up_the_end(tmp_path: Path, stores: dict[str, Path]) -> None:
    """The pipeline is given up, so that nobody reads from Ray when the interpreter ends: that can cost the exit code."""
    program, began = tmp_path / "rank.py", time.time() - 1
    program.write_text(HANGING_PROGRAM)
    data = config_data(stream__backend="ray", stream__workers=2, train__max_steps=100_000)
    (process,) = run_ranks(program, data, stores["zarr"], world=1)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0
    assert "no sample for 4 s while the stream was closed; giving up the sample of position" in output
    assert "a Ray pipeline did not stop" not in output
    assert_gone(began)


def assert_gone(since: float, limit_s: float = 40) -> None:
    """All Ray processes that started after `since` end within the limit, and their folders and rendezvous files go."""
    deadline = time.monotonic() + limit_s
    while (ray_processes(since) or ray_files(since)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [" ".join(p.cmdline())[:120] for p in ray_processes(since)]
    assert not ray_files(since)


def ray_files(since: float) -> list[Path]:
    """What private clusters keep in the folder for temporary files."""
    folder = Path(tempfile.gettempdir())
    return [p for pattern in ("hray-*", "hermes-ray-*/*") for p in folder.glob(pattern) if p.stat().st_mtime >= since]
