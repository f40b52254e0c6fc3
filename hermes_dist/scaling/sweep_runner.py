"""Runs the members of a sweep as child processes, a number at a time: the one file of this room that acts.

A member's state lies in its directory, so a sweep that was killed goes on: finished and diverged runs are kept, dead ones are
started again and resume from their own checkpoints. A diverging run is stopped, so that its time goes to the others. A lock
in the member's directory is inherited by its process: a member that outlived a killed sweep is waited for, never run twice.
Members that run at a time have GPUs of their own, and a stated number of threads.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from hermes_dist.scaling.member_resources import check_gpus, member_environment, threads_per_rank, visible_gpus
from hermes_dist.scaling.sweep import Member, StopConfig, SweepConfig
from hermes_dist.scaling.sweep_identity import check_unchanged, lacking
from hermes_dist.scaling.sweep_results import State, read_state, write_state
from hermes_dist.telemetry.jsonl import RowFollower

POLL_S = 1.0
GRACE_S = 60.0


@dataclass
class Running:
    """One started member: its process, the commands that follow it, its GPUs, and the losses that it has written so far."""

    member: Member
    gpus: list[str]
    process: subprocess.Popen[bytes]
    waiting: list[list[str]]
    log: IO[bytes]
    lock: IO[bytes]
    started: float
    rows: RowFollower
    losses: list[float | None] = field(default_factory=list[float | None])


def to_run(state: State, missing: Sequence[Path] = ()) -> State:
    """A new call of the sweep tries failed members again, and those that lack a result (`missing` files) that it asks for."""
    return State() if state.state == "failed" or (state.state == "done" and missing) else state


def divergence(losses: Sequence[float | None], stop: StopConfig) -> str:
    """Why a run with these losses (None = NaN or Inf), one a step, has diverged; empty if it has not.

    The last window is compared with the best of those before it, so that a run which learned and then lost it is found however
    high it began. A run of fewer than two windows has nothing to be compared with; NaN or Inf are found after one.
    """
    early, late = losses[: -stop.window], losses[-stop.window :]
    if len(late) == stop.window and all(loss is None for loss in late):
        return f"the loss was NaN or Inf for {stop.window} steps"
    windows = [early[at : at + stop.window] for at in range(0, len(early) - stop.window + 1, stop.window)]
    means = [float(np.mean([x for x in window if x is not None])) for window in windows if any(x is not None for x in window)]
    last = float(np.mean([x for x in late if x is not None] or [0.0]))
    if means and last > stop.factor * min(means):
        return f"the loss rose from {min(means):.3g} to {last:.3g}, more than {stop.factor:g}-fold"
    return ""


class Runner:
    """Runs members locally. `on_change(states)` is called about once a second, for a live table."""

    def __init__(
        self, sweep: SweepConfig, members: Sequence[Member], train: Path, on_change: Callable[[dict[str, State]], None]
    ) -> None:
        """`train`: launch/train.py, beside which evaluate.py lies.

        Raises:
            ConfigError: a member's directory holds a run of an earlier form of the sweep.
            UsageError: a member has more ranks than this host has GPUs, and it has some.
        """
        check_unchanged(members)
        self._gpus = visible_gpus()
        check_gpus(members, self._gpus)
        self._sweep, self._members, self._train, self._on_change = sweep, members, train, on_change
        self._at_once = min(sweep.at_once, max(1, len(members)))
        self.states = {member.name: to_run(read_state(member), lacking(member, sweep)) for member in members}

    def run(self) -> dict[str, State]:
        """Until every member is done, diverged or out of tries; an interrupt stops the running ones, which resume next time."""
        running: list[Running] = []
        try:
            while True:
                for member in self._members:
                    free = [gpu for gpu in self._gpus if not any(gpu in child.gpus for child in running)]
                    room = len(running) < self._at_once and (not self._gpus or len(free) >= member.ranks)
                    if room and self.states[member.name].state == "waiting":
                        running += self._start(member, free[: member.ranks])
                self._on_change(self.states)
                if all(state.state not in ("waiting", "running") for state in self.states.values()):
                    return self.states
                time.sleep(POLL_S)
                running = [r for r in running if not self._ended(r)]
        finally:
            for child in running:
                _signal(child, signal.SIGTERM)  # all at once: each then writes its checkpoint
            for child in running:
                _stop(child)

    def _start(self, member: Member, gpus: list[str]) -> list[Running]:
        """Start a member on these GPUs, unless another process still runs it (then its own state says what became of it)."""
        member.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (member.run_dir / ".sweep.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            self.states[member.name] = State("waiting", 0, "still running from an earlier start; waiting for it")
            return []
        stored, missing = read_state(member), lacking(member, self._sweep)
        found = to_run(stored, missing)
        if found.state != "waiting":
            self.states[member.name] = found
            lock.close()
            return []
        evaluations = zip(
            member.results(self._sweep), member.evaluations(self._sweep, self._train.with_name("evaluate.py")), strict=True
        )
        commands = [] if stored.state == "done" else [member.command(self._train)]
        commands += [command for result, command in evaluations if stored.state != "done" or result in missing]
        self._set(member, State("running", self.states[member.name].tries + 1))
        log = (member.run_dir / "log.txt").open("ab")
        process = self._popen(commands[0], member, gpus, log, lock)
        return [Running(member, gpus, process, commands[1:], log, lock, time.monotonic(), RowFollower(member.metrics))]

    def _ended(self, child: Running) -> bool:
        code, member = child.process.poll(), child.member
        state = self.states[member.name]
        fresh, rows = child.rows.read()
        child.losses = [*([] if fresh else child.losses), *(row.get("loss") for row in rows)]
        reason = divergence(child.losses, self._sweep.stop)
        if reason:
            _stop(child)
            self._set(member, replace(state, state="diverged", reason=reason))
            return True
        if code is None:
            limit_s = self._sweep.stop.limit_s
            if limit_s is None or time.monotonic() - child.started < limit_s:
                return False
            _stop(child)
            self._set(member, replace(state, state="failed", reason=f"ran past stop.limit_s={limit_s:g} s"))
            return True
        if code == 0 and child.waiting:
            child.process = self._popen(child.waiting.pop(0), member, child.gpus, child.log, child.lock)
            return False
        if code == 0:
            self._set(member, replace(state, state="done", reason=""))
        else:
            again = state.tries <= self._sweep.retries
            reason = f"exit code {code}, see {member.run_dir / 'log.txt'}"
            self._set(member, replace(state, state="waiting" if again else "failed", reason=reason))
        _close(child)
        return True

    def _set(self, member: Member, state: State) -> None:
        self.states[member.name] = state
        write_state(member, state)

    def _popen(
        self, command: list[str], member: Member, gpus: list[str], log: IO[bytes], lock: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        threads = threads_per_rank(self._sweep, member.ranks, at_once=self._at_once, gpus=bool(gpus))
        environment = member_environment(gpus, threads)
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )


def _signal(child: Running, number: int) -> None:
    with suppress(ProcessLookupError):
        if child.process.poll() is None:
            os.killpg(child.process.pid, number)


def _stop(child: Running) -> None:
    """End the member's whole process group: a launcher's ranks too. SIGTERM first, so that it can write a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(child, number)
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(GRACE_S)
            break
    _close(child)


def _close(child: Running) -> None:
    child.log.close()
    child.lock.close()
