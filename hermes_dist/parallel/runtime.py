"""The processes of a run: rank, device, small collectives, signals, and the limits of waiting.

Tensors of the model travel through DeepSpeed. What goes through here is small control traffic (a flag, a few integers), on a
gloo group of its own, so that it never waits behind gradients and never synchronises a device.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist

from hermes_dist.config import Config
from hermes_dist.errors import UsageError, WaitTimeoutError
from hermes_dist.parallel.alarm import Alarm
from hermes_dist.parallel.launchers import Place, read_place
from hermes_dist.parallel.meeting import agent_store
from hermes_dist.parallel.watchdog import Watchdog

EXIT_REQUEUE = 75
"""Exit code of a run that was asked to stop and wrote a checkpoint: the recipes requeue on it (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Runtime:
    """This process among all processes of the run.

    `stop_requested` becomes true on every rank after the same step, once any rank received SIGTERM or SIGUSR1.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launcher: str
    limit_s: float
    watchdog: Watchdog
    alarm: Alarm
    stop_requested: bool = False
    _signalled: bool = False
    _control: dist.ProcessGroup | None = None
    _vote: tuple[torch.Tensor, dist.Work] | None = None
    _handlers: dict[int, object] = field(default_factory=dict)

    @property
    def group_limit_s(self) -> float:
        """Limit of the device's collectives. NCCL ends the process without a word: there the watchdog comes first, and speaks."""
        return _group_limit_s(self.device, self.limit_s)

    def barrier(self) -> None:
        """Wait until every rank is here. Raises WaitTimeoutError after `limit_s`."""
        self.sum(torch.zeros(1))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place and returned. CPU tensors use the control group, device tensors the device's backend."""
        if self.world_size > 1:
            group = self._control if tensor.device.type == "cpu" else None
            try:
                dist.all_reduce(tensor, group=group)
            except RuntimeError as error:
                raise self.explain(error, "sum over ranks") from error
        return tensor

    def gather_int64(self, array: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """One-dimensional integer arrays (lengths may differ) of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [array]
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = array.size
        sizes = [int(n) for n in self.sum(lengths)]
        padded = torch.zeros(max(sizes), dtype=torch.int64)
        padded[: array.size] = torch.from_numpy(array)
        parts = [torch.empty_like(padded) for _ in sizes]
        try:
            dist.all_gather(parts, padded, group=self._control)
        except RuntimeError as error:
            raise self.explain(error, "gather over ranks") from error
        return [part[:size].numpy() for part, size in zip(parts, sizes, strict=True)]

    def gather_lines(self, lines: list[str]) -> list[str]:
        """Lines of all ranks, in rank order, on every rank. For rare news: a collective of a few kilobytes."""
        text = np.frombuffer("\n".join(lines).encode(), dtype=np.uint8).astype(np.int64)
        return [line for part in self.gather_int64(text) for line in part.astype(np.uint8).tobytes().decode().splitlines()]

    def say(self, line: str) -> None:
        """A line for the person at the terminal, once per run."""
        if self.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def broadcast_int(self, value: int) -> int:
        """Rank 0's integer, on every rank."""
        return int(self.sum(torch.tensor([value if self.rank == 0 else 0], dtype=torch.int64))[0])

    def begin_vote(self) -> None:
        """Start, without waiting, to ask all ranks whether one was told to stop. `end_vote` collects the answer."""
        flag = torch.tensor([int(self._signalled)], dtype=torch.int32)
        if self.world_size == 1:
            self.stop_requested = self.stop_requested or self._signalled
        elif self._vote is None:
            work = dist.all_reduce(flag, group=self._control, async_op=True)
            assert work is not None
            self._vote = (flag, work)

    def end_vote(self) -> None:
        """Take the answer: `stop_requested` is the same on all ranks afterwards."""
        if self._vote is None:
            return
        flag, work = self._vote
        self._vote = None
        try:
            work.wait()
        except RuntimeError as error:
            raise self.explain(error, "vote on stopping") from error
        self.stop_requested = self.stop_requested or bool(flag[0])

    def vote_to_stop(self) -> bool:
        """Ask all ranks now, and wait for the answer: `stop_requested`, the same on all of them."""
        self.begin_vote()
        self.end_vote()
        return self.stop_requested

    @property
    def signalled(self) -> bool:
        """Whether this very process was told to stop. Other ranks learn it at the next vote."""
        return self._signalled

    def request_stop(self, *_: int | FrameType | None) -> None:
        """Ask the run to stop after the current step (the signal handler; also for tests)."""
        self._signalled = True
        if self.world_size == 1:
            self.stop_requested = True

    def explain(self, error: RuntimeError, operation: str) -> WaitTimeoutError | RuntimeError:
        """A collective's error as one that names rank, step and operation; other errors come back as they are."""
        text = str(error)
        if not any(sign in text for sign in ("imed out", "imeout", "Connection closed", "Connection reset", "closed by peer")):
            return error
        where, first_line = self.watchdog.describe(), text.splitlines()[0][:200]
        if "imed out" in text or "imeout" in text:
            self.alarm.ring(f"{where}: {operation} did not complete within {self.limit_s:.0f} s", error)
        return WaitTimeoutError(
            f"{where}: {operation} did not complete within {self.limit_s:.0f} s, or a peer is gone: {first_line}. "
            "Look at the other ranks' output for the first failure; train.step_limit_s is the limit"
        )

    def close(self) -> None:
        """Leave the process group and restore the signal handlers.

        Ranks that stop on a signal ignore further ones from here on: the first that is gone makes srun end the others, and one
        that died of it would hide exit code 75 from the recipe. A world of one keeps its group: DeepSpeed holds on to it, and a
        second run in the same process uses it again.
        """
        self.watchdog.close()
        self.alarm.close()
        leaving = self.stop_requested and self.world_size > 1
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)  # pyright: ignore[reportArgumentType]
        self._handlers.clear()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(config: Config) -> Runtime:
    """Join the run's processes and choose the device; prints one line on rank 0.

    Works under deepspeed, torchrun and srun, and as a world of one under plain python. SIGTERM and SIGUSR1 become
    `stop_requested`.

    Raises:
        UsageError: the launcher's variables contradict each other, or there are more local ranks than GPUs.
        WaitTimeoutError: the other ranks did not appear within `train.step_limit_s`.
    """
    place = read_place(os.environ)
    # DeepSpeed reads these even where torch.distributed is up already.
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    if place.launcher == "srun":  # the others say it themselves; the data workers and evaluation ask for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(place.local_world_size))
    device = _choose_device(place)
    threads = _choose_threads(place, device)
    limit_s = config.train.step_limit_s
    store = _join(place, device, limit_s)
    # A connection of its own: a call that waits holds the lock of the connection it uses.
    clone = None if store is None else store.clone()  # pyright: ignore[reportAttributeAccessIssue] - missing in torch's stubs
    alarm = Alarm(clone, place.rank)
    watchdog = Watchdog(rank=place.rank, limit_s=limit_s * 1.25 + 10, alarm=alarm)
    runtime = Runtime(place.rank, place.local_rank, place.world_size, device, place.launcher, limit_s, watchdog, alarm)
    if place.world_size > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s))
        assert isinstance(group, dist.ProcessGroup)
        runtime._control = group  # pyright: ignore[reportPrivateUsage]
    for number in STOP_SIGNALS:
        runtime._handlers[number] = signal.signal(number, runtime.request_stop)  # pyright: ignore[reportPrivateUsage]
    if place.rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
        print(f"{place.world_size} process(es) by {place.launcher}; rank 0 on {device} ({name})", file=sys.stderr, flush=True)
    return runtime


def _choose_device(place: Place) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        # Said before deepspeed is imported: it chooses its device at import time.
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # Slurm with --gpus-per-task shows each rank its own GPU only, as number 0.
    index = 0 if visible == 1 and place.launcher == "srun" else place.local_rank
    if index >= visible:
        raise UsageError(
            f"local rank {place.local_rank} has no GPU: {visible} visible; start at most {visible} ranks per host "
            "(--num_gpus, --nproc-per-node), or set DS_ACCELERATOR=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _choose_threads(place: Place, device: torch.device) -> int:
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // place.local_world_size)
        # On a GPU host the cores belong to the data workers.
        torch.set_num_threads(min(share, 4) if device.type == "cuda" else share)
    return torch.get_num_threads()


def interface_towards(address: str, port: int) -> str | None:
    """Name of the network interface that reaches `address` (its own interface if it is this host), or None if unknown."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent, the system only chooses the route
            local = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, own in psutil.net_if_addrs().items() if any(a.address == local for a in own)), None)


def _group_limit_s(device: torch.device, limit_s: float) -> float:
    return limit_s if device.type == "cpu" else 1.5 * limit_s + 20


def _join(place: Place, device: torch.device, limit_s: float) -> dist.Store | None:
    """Make the world's process group; returns the key-value store that its ranks met in (None for a world of one)."""
    timeout = timedelta(seconds=_group_limit_s(device, limit_s))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if place.master is None:
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    address, port = place.master
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    if interface := interface_towards(address, port):
        # gloo would take the interface that this host's own name resolves to, which is often loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        restarts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if restarts:
            store = agent_store(address, port, place.rank, place.world_size, limit_s)
        else:
            store = dist.TCPStore(address, port, place.world_size, is_master=place.rank == 0, timeout=timeout, multi_tenant=True)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
        return store
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise WaitTimeoutError(
            f"rank {place.rank} of {place.world_size} could not meet the others at {address}:{port} in {limit_s:.0f} s: {error}. "
            "Check that every rank was started and that the port is free on the first host and reachable from all (--master_port)"
        ) from None
