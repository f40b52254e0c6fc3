"""launch/until_done.sh: restarts what failed, and passes a signal to the ranks under a launcher that does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "until_done.sh"
LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": "0"})
sys.exit(rank.wait())
"""
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "checkpoint").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / f"started{len(list(folder.glob('started*')))}").touch()
time.sleep(120)
"""


def run(command: str, restarts: int = 2) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MAX_RESTARTS": str(restarts), "RESTART_PAUSE_S": "0"}
    return subprocess.run([SCRIPT, "bash", "-c", command], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "code", "restarts"), [("exit 0", 0, 0), ("exit 2", 2, 0), ("exit 75", 75, 0), ("exit 7", 7, 2)]
)
def test_only_failures_are_tried_again(command: str, code: int, restarts: int) -> None:
    done = run(command)
    assert (done.returncode, done.stderr.count("restart ")) == (code, restarts)


def test_it_ends_when_a_restart_succeeds(tmp_path: Path) -> None:
    done = run(f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; kill -9 $$; }}")
    assert (done.returncode, done.stderr.count("restart ")) == (0, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("launched", [True, False])
def test_a_signal_reaches_the_ranks_and_nothing_is_started_again(number: signal.Signals, launched: bool, tmp_path: Path) -> None:
    """The launcher would die of it, as deepspeed's does on one host, and leave its ranks behind."""
    for name, text in (("launcher.py", LAUNCHER), ("rank.py", RANK)):
        (tmp_path / name).write_text(text)
    command = [sys.executable, *([tmp_path / "launcher.py"] if launched else []), tmp_path / "rank.py", tmp_path]
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    # A shell cannot trap what it was started to ignore, as SIGINT in the background of another.
    process = subprocess.Popen(
        [SCRIPT, *command], env=env, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "started1").exists()
    assert not psutil.wait_procs(below, timeout=30)[1]


def test_a_signal_between_two_tries_asks_to_be_started_again_later() -> None:
    """The code is that of a stop, not that of the failure before."""
    env = {**os.environ, "RESTART_PAUSE_S": "60"}
    with subprocess.Popen([SCRIPT, "bash", "-c", "exit 7"], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "restart 1 after code 7" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
