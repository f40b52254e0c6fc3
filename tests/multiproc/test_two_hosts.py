"""Several hosts, for real: two network namespaces joined by a veth pair. Rendezvous, training, the loss of a host, Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.multiproc.hosts import Host, two_hosts, why_not
from tests.multiproc.ranks import run_ranks

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
    run, steps = tmp_path / "run", 60
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
