"""Two hosts on one machine: network namespaces joined by a veth pair. They share files, but neither loopback nor ports.

Needs the right to make namespaces (root, or CAP_NET_ADMIN and CAP_SYS_ADMIN); `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.multiproc.ranks import ROOT


@dataclass
class Host:
    """A network namespace with one interface. `private` is a path that each host sees as a folder of its own."""

    name: str
    address: str
    private: Path
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Run a command on this host, from the repository's root, in a session of its own; its output is captured."""
        script = f'mount --bind {self.folder} {self.private} && exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", script, "sh", *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def pull_the_plug(self) -> None:
        """SIGKILL to every process of this host, whoever started it."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        for pid in listed.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "no `ip` command (iproute2)"
    name = f"hermes-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


@contextmanager
def two_hosts(folder: Path) -> Generator[tuple[Host, Host]]:
    """Two namespaces with addresses 10.231.N.1 and .2; everything in them is killed at the end."""
    number, names = os.getpid() % 200, [f"hermes-{os.getpid()}-{i}" for i in (1, 2)]
    private = Path(tempfile.mkdtemp(prefix="hnet-"))  # Ray's sockets need a short path
    hosts: list[Host] = []
    try:
        for i, name in enumerate(names, start=1):
            _ip("netns", "add", name)
            (folder / name).mkdir()
            hosts.append(Host(name, f"10.231.{number}.{i}", private, folder / name))
        _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _ip("-n", host.name, "link", "set", device, "up")
            # Programs find their own address by asking for the route to anywhere.
            _ip("-n", host.name, "route", "add", "default", "dev", "veth0")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.pull_the_plug()
            for process in host.processes:
                process.communicate()
            _ip("netns", "delete", host.name)
        private.rmdir()


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"
