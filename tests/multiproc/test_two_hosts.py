"""Several hosts, for real: two network namespaces joined by a veth pair. Rendezvous, training, the loss of a host, Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert
from data_tools.phantom import write_phantoms
from tests.multiproc.hosts import Host, two_hosts, why_not
from tests.multiproc.ranks import ROOT, run_ranks

REASON = why_not()
pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SCRIPT = "tests/multiproc/train_worker.py"
PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}


@pytest.fixture
def hosts(tmp_path: Path) -> Generator[tuple[Host, Host]]:
    (tmp_path / "net").mkdir()
    with two_hosts(tmp_path / "net") as pair:
        yield pair


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a step that was computed twice keeps the last one."""
    rows = [line.split() for line in (run_dir / "losses.txt").read_text().splitlines()]
    return {int(step): float.fromhex(loss) for step, loss in rows}


def expected(folder: Path, steps: int) -> dict[int, float]:
    """The same run by one process on one host."""
    folder.mkdir()
    run_ranks("tests.multiproc.train_worker", [str(folder), str(steps), '{"save_every": 1000}'], 1)
    return losses(folder)


def finish(processes: list[subprocess.Popen[str]], limit_s: float = 240) -> list[str]:
    outputs = [process.communicate(timeout=limit_s)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def torchrun(host: Host, master: Host, *args: str) -> list[str]:
    # A namespace has no name that resolves: say which host holds the rendezvous, and which address each has.
    conf = f"is_host={int(host is master)},last_call_timeout=5"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master.address}:29400", "--rdzv-id", "two", "--rdzv-conf", conf]
    return ["torchrun", *rendezvous, "--local-addr", host.address, "--nproc-per-node", "1", *args]


def test_torchrun_goes_on_with_one_host_when_the_other_is_lost(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 40
    run.mkdir()
    options = json.dumps({"sleep_s": 0.1, "stage": 2})
    elastic = ["--nnodes", "1:2", "--max-restarts", "3"]
    first, second = (
        host.start([*torchrun(host, hosts[0], *elastic), SCRIPT, str(run), str(steps), options], PATH) for host in hosts
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((run / "losses.txt").exists() and len(losses(run)) >= 3):
        time.sleep(0.1)
    assert second.poll() is None
    hosts[1].pull_the_plug()
    (output,) = finish([first])
    assert "2 process(es) by torchrun" in output
    assert "1 process(es) by torchrun" in output
    found = losses(run)
    assert sorted(found) == list(range(steps))
    assert found == pytest.approx(expected(tmp_path / "one", steps), rel=1e-5)


def test_deepspeed_launcher_on_two_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    run, hostfile, steps = tmp_path / "run", tmp_path / "hostfile", 6
    run.mkdir()
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    common = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--no_local_rank", "--master_addr", hosts[0].address]
    options = json.dumps({"stage": 3})
    processes = [
        host.start([*common, "--node_rank", str(rank), SCRIPT, str(run), str(steps), options], PATH)
        for rank, host in enumerate(hosts)
    ]
    outputs = finish(processes)
    assert "2 process(es) by deepspeed" in outputs[0]
    assert losses(run) == pytest.approx(expected(tmp_path / "one", steps), rel=1e-5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    collection = read_collection_file(write_phantoms(folder / "raw", seed=3, cases=3))
    convert(collection, str(folder / "store"), Settings(workers=0), say=lambda _: None)
    return folder / "store"


def training(store: Path, out: Path, *more: str) -> list[str]:
    settings = [f'data.stores=["{store}"]', f"run.output_dir={out}", "run.name=run", "train.max_steps=3", "train.global_batch=4"]
    quiet = ["train.micro_batch=1", "optimizer.eps=1e-3", "monitor.prometheus_port=-1"]
    return ["launch/train.py", "--config", "demo.json", *settings, *quiet, *more]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def test_training_over_a_ray_cluster_of_head_and_worker(hosts: tuple[Host, Host], store: Path, tmp_path: Path) -> None:
    """Ray's head on one host, a worker on the other, one training rank on each: the samples and losses of one process."""
    head, worker = hosts
    env = {**PATH, "RAY_AUTH_MODE": "disabled"}
    common = ["--num-cpus", "1", "--object-store-memory", str(100 << 20), "--disable-usage-stats"]
    address = f"{head.address}:6379"
    folder = ["--temp-dir", str(head.private)]
    ray = ["ray", "start", "--head", "--port", "6379", "--include-dashboard", "false", "--node-ip-address", head.address, *folder]
    finish([head.start([*ray, *common], env)])
    finish([worker.start(["ray", "start", "--address", address, "--node-ip-address", worker.address, *common], env)])
    program = training(
        store, tmp_path, "stream.backend=ray", f"stream.ray_address={address}", "deepspeed.zero_optimization.stage=3"
    )
    outputs = finish([host.start([*torchrun(host, head, "--nnodes", "2"), *program], env) for host in hosts])
    assert "2 process(es) by torchrun" in outputs[0]
    alone = subprocess.run(
        [sys.executable, *training(store, tmp_path / "alone", "stream.backend=inline")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    expected, found = rows(tmp_path / "alone"), rows(tmp_path)
    assert [r["order_hash"] for r in found] == [r["order_hash"] for r in expected]
    assert [r["loss"] for r in found[:2]] == pytest.approx([r["loss"] for r in expected[:2]], rel=1e-5)
