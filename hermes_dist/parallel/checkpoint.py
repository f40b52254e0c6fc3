"""Checkpoints: complete or invisible, written while training goes on, readable by any world size and ZeRO stage.

    RUN/checkpoints/step_00001000/checkpoint.json         state of the caller, shapes, table of pieces, size and CRC-32 per file
                                 /rank_00000.safetensors  what rank 0 owned (see fragments.py)
    RUN/checkpoints/latest                                name of the newest complete one

A directory is written under a hidden temporary name by all ranks, and renamed by rank 0 once every file is on the disk, so a
kill at any instant leaves the previous checkpoint in force. Ranks tell each other through files in that directory: the writer
threads need no collectives, which training uses meanwhile. It follows that all ranks must see one file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from hermes_dist.config import CheckpointConfig
from hermes_dist.errors import CheckpointError
from hermes_dist.parallel import rollback
from hermes_dist.parallel.agreement import ask_rank_0
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.fragments import sync_directory, write_bytes, write_tensors
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.parallel.snapshot import Snapshot, changed_settings, restore_random, restore_snapshot, take_snapshot
from hermes_dist.parallel.stored import (
    AMENDED,
    FORMAT,
    Stored,
    abandon,
    await_checkpoint,
    list_checkpoints,
    mark_best,
    open_checkpoint,
    prune,
    read_extra,
    read_state,
    set_aside,
)
from hermes_dist.telemetry.telemetry import Telemetry

FAILED = "failed"
"""A file of this name in a temporary directory: one rank gave up, so that rank 0 need not wait for it."""
WRITER_NICENESS = 10
_WHAT_TO_DO = "Restore one from a backup, name one with run.resume=PATH, or start anew with another run.name"
_POLL_S = 0.02


class Checkpointer:
    """Saves and loads the checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self._root, self._run_dir = run_dir / "checkpoints", run_dir
        self._config, self._runtime = config, runtime
        self._thread: threading.Thread | None = None
        self._temporary: Path | None = None
        self.saved_step: int | None = None
        """Of the newest checkpoint that was begun, or of the run's own one that was loaded."""
        self._verdict: CheckpointError | None = None
        self._failures = 0
        self._error: Exception | None = None
        self.last_written: Path | None = None
        """The newest checkpoint that this process wrote to the end (rank 0)."""
        self.telemetry: Telemetry | None = None
        """Where durations, size, age and failures are reported."""

    def save(self, engine: Engine, state: dict[str, Any], step: int, *, best: bool = False, urgent: bool = False) -> None:
        """Write a checkpoint of `engine` and the JSON-able `state` of the caller, as `step_{step:08d}`.

        `best`: it is the best so far, and is kept until a better one is complete. `urgent`: no steps follow, so that writing need
        not make room for them.
        With `checkpoint.background` it returns once a snapshot is taken; `finish` or the next `save` waits for the file.

        Raises:
            CheckpointError: two writes in a row failed. One alone is said, and this one written all the same: what filled the
                disk may be gone, and a run that is asked to stop has no later chance.
        """
        began = time.perf_counter()
        self._forgive()
        token = self._runtime.broadcast_int(secrets.randbits(40))
        temporary = self._root / f".tmp-step_{step:08d}-{token:010x}"
        self._temporary, self.saved_step = temporary, step
        if self._runtime.rank == 0:
            with contextlib.suppress(OSError):  # the writer meets the same error, and reports it
                temporary.mkdir(parents=True)
        snapshot = take_snapshot(engine, copy=self._config.background)
        self._runtime.barrier()
        # A daemon: a rank that failed must be able to end although its writer waits for a peer that is gone.
        behind = self._config.background and not urgent
        arguments = (temporary, snapshot, state, step, best, behind)
        job = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread = job
        job.start()
        if not self._config.background:
            self._forgive()
        if self.telemetry is not None:
            seconds = time.perf_counter() - began
            self.telemetry.observe("hermes_checkpoint_duration_seconds", seconds, phase="snapshot")
            self.telemetry.observe("hermes_step_part_seconds", seconds, part="checkpoint")

    def amend(self, engine: Engine, state: dict[str, Any], step: int, *, best: bool = False) -> None:
        """Give the checkpoint of `step` the caller's new `state`; its tensors are not written again.

        If none was saved at `step`, or its write failed, one is written where it is the `best` so far.

        Raises:
            CheckpointError: as `save`.
        """
        self._forgive()
        if self.saved_step != step or self._verdict is not None:
            if best:
                self.save(engine, state, step, best=True)
            return
        if self._runtime.rank == 0:
            try:
                # In this order: killed in between, the state is not amended, and the caller does the same once more.
                if best:
                    mark_best(self._run_dir, step)
                write_bytes(self._root / f"step_{step:08d}" / AMENDED, json.dumps(state).encode())
            except OSError as error:
                self._runtime.say(f"warning: {self._root}: the result of step {step} could not be noted: {error}")

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete on the disk of all ranks.

        No rank returns before: a launcher that ends all ranks when the first one leaves must not meet a half-written one.

        Raises:
            CheckpointError: it could not be written, here or on another rank.
        """
        self._settle()
        if self._verdict is not None:
            raise self._verdict

    def _settle(self) -> None:
        """Wait for the write under way; `_verdict` is what went wrong with the newest one, on all ranks alike."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if not int(self._runtime.sum(torch.tensor([int(error is not None)]))[0]):
            self._verdict, self._failures = None, 0
            return
        mine = [] if error is None else [f"rank {self._runtime.rank}: {type(error).__name__}: {error}".replace("\n", " ")]
        reasons = self._runtime.gather_lines(mine)
        more = f" (and {len(reasons) - 4} more ranks)" if len(reasons) > 4 else ""
        self._verdict = CheckpointError(f"{self._root}: the checkpoint could not be written: {'; '.join(reasons[:4])}{more}")
        self._verdict.__cause__ = error
        self._failures += 1
        if self._runtime.rank == 0 and self._temporary is not None:
            # It may be what fills the disk.
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _forgive(self) -> None:
        """Wait for the write under way; let one failure pass, and raise the second in a row."""
        if self._thread is None:
            return
        self._settle()
        if self._failures > 1:
            self.finish()
        if self._verdict is not None:
            self._runtime.say(
                f"warning: {self._verdict}. The run goes on; it ends if the next checkpoint cannot be written either"
            )

    def load(self, engine: Engine, resume: str = "auto") -> dict[str, Any] | None:
        """Restore `engine` and return the caller's state.

        Args:
            engine: an engine of the same model, under any world size and ZeRO stage.
            resume: `auto` (newest complete and undamaged checkpoint of the run, None if there is none), `never`, or a path. A
                path of the run's own checkpoints makes the run go back (see rollback.py).

        Raises:
            CheckpointError: the checkpoint is of another model, all that exist are damaged, or a host does not see the one that
                rank 0 chose.
        """
        if resume == "never":
            return None
        candidates, branches = ask_rank_0(self._runtime, lambda: self._candidates(resume))
        for path, crc32 in candidates:
            stored = self._open_everywhere(Path(path), crc32)
            if stored is not None:
                state = self._restore(engine, stored)
                if stored.path.resolve().parent == self._root.resolve():
                    self.saved_step = stored.step
                if branches:
                    line = ask_rank_0(self._runtime, lambda: rollback.branch_off(self._root, Path(resume)))
                else:
                    line = rollback.note(self._root, Path(resume), stored.path) if resume != "auto" else None
                if line:
                    self._runtime.say(line)
                return state
        if candidates:
            raise CheckpointError(f"{self._root}: none of {len(candidates)} checkpoints is undamaged. {_WHAT_TO_DO}")
        return None

    def _candidates(self, resume: str) -> tuple[list[tuple[str, int]], bool]:
        """On rank 0: path and CRC-32 of the index of what to try in turn; and whether the run branches off there."""
        branches = False
        if resume == "auto":
            found = list_checkpoints(self._run_dir)
            if not found and (unreadable := sorted(p.name for p in self._root.glob("step_*"))):
                raise CheckpointError(
                    f"{self._root}: the index of none of {len(unreadable)} checkpoints is undamaged ({unreadable[-1]}, …). "
                    f"{_WHAT_TO_DO}"
                )
            rollback.forget(self._root)
        else:
            found, branches = rollback.candidates(self._run_dir, Path(resume))
        return [(str(stored.path), stored.index_crc32) for stored in found], branches

    def _open_everywhere(self, path: Path, index_crc32: int) -> Stored | None:
        """The same checkpoint on every rank; None on every rank if a file of it is damaged. Each rank checks some files."""
        stored, unseen, bad = None, 0, 0
        try:
            # The others wait in the sum below, for at most the limit: give up long before, to say why.
            stored = await_checkpoint(path, index_crc32, self._runtime.limit_s / 2)
            for name in stored.damaged_files(self._runtime.rank, self._runtime.world_size):
                print(f"warning: {path / name} is damaged (size or checksum); trying the previous checkpoint", file=sys.stderr)
                bad += 1
        except CheckpointError as error:
            print(f"error: rank {self._runtime.rank}: {error}", file=sys.stderr, flush=True)
            unseen = 1
        unseen, bad = self._runtime.sum(torch.tensor([unseen, bad])).tolist()
        if unseen:
            raise CheckpointError(
                f"{path}: {unseen} of {self._runtime.world_size} ranks do not see this checkpoint, which rank 0 resumes from; "
                "their messages say why. All hosts must mount the same file system at the same path"
            )
        return None if bad else stored

    def _restore(self, engine: Engine, stored: Stored) -> dict[str, Any]:
        index = stored.index
        changes = changed_settings(index["common"].get("config", {}), engine.config.model_dump(mode="json"))
        if changes:
            self._runtime.say(f"note: settings changed since {stored.path.name}: {'; '.join(changes)}")
        reader = stored.reader()
        restore_snapshot(engine, reader, index["common"], str(stored.path))
        buffers = read_extra(stored, "rank_00000.safetensors", "buffer")
        for name, buffer in engine.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        if index["world_size"] == self._runtime.world_size:
            restore_random(engine, read_extra(stored, f"rank_{self._runtime.rank:05d}.safetensors", "random"))
        else:
            # Another world has no generator of ours; one that depends on step and rank keeps runs repeatable.
            torch.manual_seed((stored.step << 20) + self._runtime.rank)
        self._runtime.barrier()
        return ask_rank_0(self._runtime, lambda: read_state(stored))

    def _write(self, temporary: Path, snapshot: Snapshot, state: dict[str, Any], step: int, best: bool, behind: bool) -> None:
        began = time.perf_counter()
        if behind:
            with contextlib.suppress(OSError):  # Linux: of this thread only. Steps go first where all cores are busy
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            if self._runtime.rank == 0:
                temporary.mkdir(parents=True, exist_ok=True)
            name = f"rank_{self._runtime.rank:05d}.safetensors"
            entry: dict[str, Any] = dict(write_tensors(temporary / name, snapshot.tensors))
            entry["fragments"] = [f.to_json() for f in snapshot.fragments]
            write_bytes(temporary / f"{name}.json", json.dumps(entry).encode())
            if self._runtime.rank == 0:
                self._commit(temporary, snapshot.common, state, step, best)
            if self.telemetry is not None:
                self.telemetry.observe("hermes_checkpoint_duration_seconds", time.perf_counter() - began, phase="write")
        except Exception as error:  # whatever it is: an error that ended only this thread would pass for success
            self._error = error
            if self._runtime.world_size > 1:  # the others wait for it, perhaps in vain: say so at once
                print(
                    f"error: rank {self._runtime.rank}: {temporary}: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                )
            with contextlib.suppress(OSError):  # it may be what fills the disk, where the run's metrics go too
                (temporary / f"rank_{self._runtime.rank:05d}.safetensors").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (temporary / FAILED).touch()
            if self.telemetry is not None:
                self.telemetry.add("hermes_checkpoint_failures_total")

    def _commit(self, temporary: Path, common: dict[str, Any], state: dict[str, Any], step: int, best: bool) -> None:
        names = [f"rank_{rank:05d}.safetensors" for rank in range(self._runtime.world_size)]
        # The others wait in a sum, for at most the limit: give up long before, to say why.
        files = {name: _await_json(temporary / f"{name}.json", self._runtime.limit_s / 2) for name in names}
        now = time.time()
        index = {
            "format": FORMAT,
            "step": step,
            "time": now,
            "world_size": self._runtime.world_size,
            "common": common,
            "state": state,
            "files": files,
        }
        write_bytes(temporary / "checkpoint.json", json.dumps(index).encode())
        for name in names:
            (temporary / f"{name}.json").unlink()
        sync_directory(temporary)
        final = self._root / f"step_{step:08d}"
        if final.exists():
            _make_room(final)
        temporary.rename(final)
        sync_directory(self._root)
        write_bytes(self._root / "latest", f"{final.name}\n".encode())
        self.last_written = final
        if best:
            mark_best(self._run_dir, step)
        if self.telemetry is not None:
            if self._config.every_steps:  # without a rhythm no age is too old: those at the end and of the best step have none
                self.telemetry.set("hermes_checkpoint_timestamp_seconds", now)
            self.telemetry.set("hermes_checkpoint_step", step)
            self.telemetry.set("hermes_checkpoint_size_bytes", sum(entry["bytes"] for entry in files.values()))
        try:
            prune(self._root, self._config, final.name)
        except OSError as error:  # the checkpoint is complete all the same
            print(f"warning: {self._root}: older checkpoints could not be removed: {error}", file=sys.stderr, flush=True)


def _make_room(final: Path) -> None:
    """Put a checkpoint of the same step out of the way: a directory cannot be replaced in one go."""
    try:
        open_checkpoint(final)
    except CheckpointError:  # whatever it is, it is not ours to delete
        abandon(final)
    else:
        set_aside(final)


def _await_json(path: Path, limit_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + limit_s
    while True:
        if path.is_file():
            return json.loads(path.read_bytes())
        if (path.parent / FAILED).exists():
            raise CheckpointError(f"{path.parent}: another rank could not write its part")
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path.parent}: {path.name} did not appear within {limit_s:.0f} s; do all ranks see this file system?"
            )
        time.sleep(_POLL_S)
