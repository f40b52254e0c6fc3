"""One Ray cluster per host for all ranks: started by local rank 0, joined by the others, gone when it ends.

With `stream.ray_address = "local"` local rank 0 starts a private cluster and writes its address into a small rendezvous file;
its siblings read it there. The file's name contains the launcher's process, which all ranks of a host share, and the file names
its writer, so that neither another job nor a dead predecessor can be mistaken for ours. With any other address nothing is
started: the ranks connect to the cluster that is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, utils

from hermes_dist.config import StreamConfig
from hermes_dist.errors import ConfigError, StreamError, WaitTimeoutError
from hermes_dist.stream import ray_reaper

ray_utils: Any = utils
ray_switches: Any = ray_constants
REACHABLE: bool = ray_switches.ENABLE_RAY_CLUSTER
START_LIMIT_S = 120.0
LEAVE_LIMIT_S = 20.0
JOIN_GRACE_S = 2.0
REAP_LIMIT_S = 20.0
PATIENT = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 10}
"""Ray's own limits (10 s, five times) end a raylet on a host whose cores are busy, and its drivers with it, without a word."""
MAX_TEMP_CHARS = 40
"""Ray appends about 65 characters to its temp folder for socket paths, which Linux limits to 107."""


def quiet_ray() -> None:
    """Environment and log levels that every rank sets before it touches Ray."""
    # Ray 2.60 switches token authentication on where it finds ~/.ray/auth_token, for one process and its children only:
    # sibling ranks then fail to connect. Whoever wants it sets the variable for all ranks.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Cluster:
    """A connection to Ray, and the cluster itself where this rank started it.

    Args:
        config: `stream` section.
        local_rank, local_world_size: this process among those of its host.
        abandoned: set when nobody needs the cluster any more; a rank that still looks for it then gives up without an error.

    Raises:
        WaitTimeoutError: local rank 0 did not announce a cluster in time.
        StreamError: Ray did not start, or the address does not answer.
    """

    def __init__(self, config: StreamConfig, *, local_rank: int, local_world_size: int, abandoned: threading.Event) -> None:
        quiet_ray()
        self._mark: Path | None = None
        self._home: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._siblings = range(0)
        self._connected = not ray.is_initialized()
        if not self._connected:
            return  # a test or a notebook has its own connection: use it, and leave it alone
        if config.ray_address != "local":
            _connect(config.ray_address)
        elif local_rank == 0:
            _stay_on_this_host()
            self._home = _new_home()
            self._siblings = range(1, local_world_size)
            self._reaper = ray_reaper.start(self._home, rendezvous_path())
            _announce(self._home, _start(config, self._home, local_world_size))
        else:
            found = _await_cluster(abandoned)
            if found is None:
                self._connected = False
                return
            _stay_on_this_host()
            self._mark = Path(found["home"]) / f"rank{local_rank}"
            _write_atomically(self._mark, _this_process())
            _connect(found["address"])

    def close(self) -> None:
        """Disconnect. Who started the cluster waits for its siblings to leave (at most LEAVE_LIMIT_S), then ends it."""
        if self._connected:
            if self._home is not None:
                _await_leave([self._home / f"rank{r}" for r in self._siblings])
            ray.shutdown()
        if self._mark is not None:
            with contextlib.suppress(OSError):  # whoever started the cluster waited long enough, and removed the folder
                _write_atomically(self._mark, {"left": True})
        if self._reaper is not None:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on without us
                self._reaper.wait(timeout=REAP_LIMIT_S)
        self._connected, self._mark, self._home, self._reaper = False, None, None, None
        ray_switches.ENABLE_RAY_CLUSTER = REACHABLE


def local_place(rank: int, world_size: int) -> tuple[int, int]:
    """(local rank, local world size) from the launcher's variables; without them all ranks are taken to share this host."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    local_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if local_rank is None:
        return rank, world_size
    return int(local_rank), int(local_size or world_size)


def rendezvous_path() -> Path:
    """File by which the ranks of a host find their cluster: unique for user, launcher process and master port.

    It lies in a folder of this user alone: whoever could write it could make the ranks run code from a cluster of his own.

    Raises:
        ConfigError: the folder is there, and is not this user's alone.
    """
    folder = Path(tempfile.gettempdir()) / f"hermes-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder that only user {os.getuid()} may use (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}); remove it, or set TMPDIR to a folder of your own"
        )
    parent = psutil.Process().parent()
    launcher = f"{parent.pid}-{int(parent.create_time())}" if parent else "0"
    port = os.environ.get("MASTER_PORT", "0")
    return folder / f"{launcher}-{port}.json"


def _start(config: StreamConfig, home: Path, local_world_size: int) -> str:
    workers = max(config.workers, config.max_workers or 0)
    options: dict[str, Any] = {
        "num_cpus": workers * local_world_size,
        "num_gpus": 0,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": (config.object_store_mib << 20) * local_world_size,
        "_temp_dir": str(home),
        "_system_config": dict(PATIENT),
    }
    os.environ[ray_reaper.MARK] = str(home)  # inherited by all processes of the cluster
    try:
        with _own_process_group():
            ray.init(address="local", **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise StreamError(
            f"Ray did not start: {error}; look into {home}, or set stream.backend=inline to read in the training process"
        ) from error
    finally:
        del os.environ[ray_reaper.MARK]
    return str(ray.get_runtime_context().gcs_address)


def _stay_on_this_host() -> None:
    """Let this process's cluster listen on 127.0.0.1 only: it runs whatever it is sent, by whoever can reach it.

    Ray replaces the loopback address by that of the network wherever it is given, but for Windows and macOS: so theirs is taken.
    """
    ray_switches.ENABLE_RAY_CLUSTER = False


@contextlib.contextmanager
def _own_process_group() -> Generator[None]:
    """Ray's processes that start inside leave this process's group.

    Slurm and torchrun signal the whole group when they ask a rank to stop. Ray would end at once, and take the rank down before
    its checkpoint is written. Ray has no option for this: the function that ties a child to its parent's life runs in the child.
    """
    tie = ray_utils.set_kill_on_parent_death_linux

    def tie_in_own_group() -> None:
        os.setpgid(0, 0)
        tie()

    ray_utils.set_kill_on_parent_death_linux = tie_in_own_group
    try:
        yield
    finally:
        ray_utils.set_kill_on_parent_death_linux = tie


def _connect(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, OSError, ValueError) as error:
        raise StreamError(
            f"Ray at {address!r} does not answer: {error}; start it with `ray start`, or check stream.ray_address"
        ) from error


def _new_home() -> Path:
    """A private folder for this cluster, short enough for socket paths.

    Raises:
        ConfigError: the system's temp folder has too long a path.
    """
    path = Path(tempfile.gettempdir()) / f"hray-{uuid.uuid4().hex[:8]}"
    if len(str(path)) > MAX_TEMP_CHARS:
        raise ConfigError(
            f"temp folder {path} has {len(str(path))} characters; Ray's sockets allow {MAX_TEMP_CHARS}: "
            "set TMPDIR to a shorter path"
        )
    path.mkdir(mode=0o700)
    return path


def _announce(home: Path, address: str) -> None:
    _write_atomically(rendezvous_path(), {"address": address, "home": str(home), **_this_process()})


def _await_cluster(abandoned: threading.Event) -> dict[str, Any] | None:
    """What a living local rank 0 announced; None if nobody needs it any more. Raises WaitTimeoutError after START_LIMIT_S."""
    path, deadline = rendezvous_path(), time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if abandoned.is_set():
            return None
        found = _read(path)
        if found is not None and _is_alive(found):
            return found
        time.sleep(0.1)
    raise WaitTimeoutError(
        f"local rank 0 announced no Ray cluster in {path} within {START_LIMIT_S:.0f} s; did it fail? See its log, "
        "or start a cluster with `ray start --head` and set stream.ray_address=auto"
    )


def _await_leave(marks: list[Path]) -> None:
    """Wait until every sibling that joined has left or died. A cluster that ends too early would take them along.

    A sibling that has not joined by now (a run shorter than Ray's start) gets a moment only: it gives up by itself.
    """
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < LEAVE_LIMIT_S:
        found = [_read(mark) for mark in marks]
        using = [f for f in found if f is not None and not f.get("left") and _is_alive(f)]
        if not using and (None not in found or waited_s > JOIN_GRACE_S):
            return
        time.sleep(0.1)


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {"pid": process.pid, "created": process.create_time()}


def _is_alive(record: dict[str, Any]) -> bool:
    """Does the process of a record still run (and is it not another one with the same number)?"""
    try:
        return abs(psutil.Process(record["pid"]).create_time() - record["created"]) < 1
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _write_atomically(path: Path, record: dict[str, Any]) -> None:
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    with scratch.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
