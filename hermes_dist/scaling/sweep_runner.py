"""Runs the members of a sweep as child processes, a number at a time: the one file of this room that acts.

A member's state lies in its directory, so a sweep that was killed goes on: finished and diverged runs are kept, dead ones are
started again and resume from their own checkpoints. A diverging run is stopped, so that its time goes to the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from hermes_dist.scaling.sweep import Member, StopConfig, SweepConfig
from hermes_dist.scaling.sweep_results import State, read_state, write_state
from hermes_dist.telemetry.jsonl import read_rows

POLL_S = 1.0
GRACE_S = 30.0


@dataclass
class Running:
    """One started member."""

    member: Member
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


def to_run(state: State) -> State:
    """A new call of the sweep tries failed members again."""
    return State() if state.state == "failed" else state


def divergence(rows: Sequence[dict[str, Any]], stop: StopConfig) -> str:
    """Why a run with these rows of metrics.jsonl has diverged; empty if it has not."""
    losses = [row.get("loss") for row in rows]
    if len(losses) < 2 * stop.window:
        return ""
    late = losses[-stop.window :]
    if all(loss is None for loss in late):
        return f"the loss was NaN or Inf for {stop.window} steps"
    first = float(np.mean([x for x in losses[: stop.window] if x is not None] or [np.inf]))
    last = float(np.mean([x for x in late if x is not None]))
    if last > stop.factor * first:
        return f"the loss rose from {first:.3g} to {last:.3g}, more than {stop.factor:g}-fold"
    return ""


class Runner:
    """Runs members locally. `on_change(states)` is called about once a second, for a live table."""

    def __init__(
        self, sweep: SweepConfig, members: Sequence[Member], train: Path, on_change: Callable[[dict[str, State]], None]
    ) -> None:
        self._sweep, self._members, self._train, self._on_change = sweep, members, train, on_change
        self.states = {member.name: to_run(read_state(member)) for member in members}

    def run(self) -> dict[str, State]:
        """Until every member is done, diverged or out of tries; an interrupt stops the running ones, which resume next time."""
        running: list[Running] = []
        try:
            while True:
                waiting = [m for m in self._members if self.states[m.name].state == "waiting"]
                while waiting and len(running) < self._sweep.at_once:
                    running.append(self._start(waiting.pop(0)))
                self._on_change(self.states)
                if not running:
                    return self.states
                time.sleep(POLL_S)
                running = [r for r in running if not self._ended(r)]
        finally:
            for child in running:
                _stop(child)

    def _start(self, member: Member) -> Running:
        tries = self.states[member.name].tries + 1
        self._set(member, State("running", tries))
        log = (member.run_dir / "log.txt").open("ab")
        command = member.command(self._train)
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return Running(member, process, log, time.monotonic())

    def _ended(self, child: Running) -> bool:
        code, member = child.process.poll(), child.member
        state = self.states[member.name]
        reason = divergence(list(read_rows(member.run_dir / "metrics.jsonl")), self._sweep.stop)
        if reason:
            _stop(child)
            self._set(member, replace(state, state="diverged", reason=reason))
            return True
        if code is None:
            if time.monotonic() - child.started < self._sweep.stop.limit_s:
                return False
            _stop(child)
            self._set(member, replace(state, state="failed", reason=f"ran past stop.limit_s={self._sweep.stop.limit_s:g} s"))
            return True
        child.log.close()
        if code == 0:
            self._set(member, replace(state, state="done", reason=""))
        else:
            again = state.tries <= self._sweep.retries
            reason = f"exit code {code}, see {member.run_dir / 'log.txt'}"
            self._set(member, replace(state, state="waiting" if again else "failed", reason=reason))
        return True

    def _set(self, member: Member, state: State) -> None:
        self.states[member.name] = state
        write_state(member, state)


def _stop(child: Running) -> None:
    """End the member's whole process group: a launcher's ranks too. SIGTERM first, so that it can write a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.process.poll() is None:
            os.killpg(child.process.pid, number)
            try:
                child.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                continue
    child.log.close()
