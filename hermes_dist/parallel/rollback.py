"""Going back: `run.resume=PATH` with one of the run's own checkpoints makes it the newest, and what came after it abandoned.

    RUN/checkpoints/rolled_back                  the checkpoint that the run went back to, or began at (a path: another run's)
                   /abandoned-step_00003000/     a newer one, out of the way: never resumed from, never deleted by the run

The same command may be started again after an interruption. By then the file names that checkpoint, so every newer one (every
one at all, where it is another run's) was written since: the newest of them is taken. All of this is done by rank 0 alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.fragments import write_bytes
from hermes_dist.parallel.stored import ABANDONED, Stored, abandon, list_checkpoints, open_checkpoint

_MARK = "rolled_back"
_NAME = re.compile(r"step_(\d+)")


def own_step(root: Path, path: Path) -> int | None:
    """The step of `path` if it is (or was) one of the checkpoints in `root`; None for one of another run.

    Raises:
        CheckpointError: it is one that this run abandoned.
    """
    if path.resolve().parent != root.resolve():
        return None
    name = path.resolve().name
    if name.startswith(ABANDONED):
        raise CheckpointError(
            f"{path} was abandoned when the run went back to an older checkpoint; to return to it, rename it to "
            f"{name.removeprefix(ABANDONED)!r} and name it in run.resume"
        )
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def candidates(run_dir: Path, path: Path) -> tuple[list[Stored], bool]:
    """What `run.resume=path` may resume from, the best first; and whether the run branches off there now (see `branch_off`)."""
    root = run_dir / "checkpoints"
    step = own_step(root, path)
    if _read(root / _MARK) != _name(root, path):
        return [open_checkpoint(path)], True
    found = [stored for stored in list_checkpoints(run_dir) if step is None or stored.step >= step]
    return found or [open_checkpoint(path)], False


def note(root: Path, path: Path, taken: Path) -> str | None:
    """What to say where a restart takes a newer checkpoint than the one that was named."""
    if taken.resolve() == path.resolve():
        return None
    if own_step(root, path) is None:
        return (
            f"goes on from {taken.name}, written since the run began at {path}; to begin there once more, delete {root / _MARK}"
        )
    return (
        f"goes on from {taken.name}, written since the run went back to {path.name}; "
        f"to go back to {path.name} once more, delete {root / _MARK}"
    )


def branch_off(root: Path, path: Path) -> str | None:
    """Abandon the run's checkpoints after `path`, all if it is another run's. Killed half-way, the next start does the rest.

    Returns:
        What to say: the names of those that were abandoned; None if there were none.
    """
    step = own_step(root, path)
    own = [(int(m[1]), found) for found in sorted(root.glob("step_*")) if (m := _NAME.fullmatch(found.name))]
    newer = [found for number, found in own if step is None or number > step]
    for found in newer:
        abandon(found)
    if _read(root / "best") in {found.name for found in newer}:
        (root / "best").unlink()
    root.mkdir(parents=True, exist_ok=True)
    if step is None:
        (root / "latest").unlink(missing_ok=True)
    else:
        write_bytes(root / "latest", f"step_{step:08d}\n".encode())
    write_bytes(root / _MARK, f"{_name(root, path)}\n".encode())
    if not newer:
        return None
    names = f"{', '.join(found.name for found in newer)} → {ABANDONED}step_…"
    if step is None:
        return f"begins at {path}; the run's own checkpoints were renamed: {names}"
    return f"goes back to {path.name}; newer checkpoints were renamed: {names}"


def forget(root: Path) -> None:
    """A start with `run.resume=auto`: naming the same checkpoint later is a new decision to go back."""
    (root / _MARK).unlink(missing_ok=True)


def _name(root: Path, path: Path) -> str:
    """How the mark names a checkpoint."""
    return path.resolve().name if own_step(root, path) is not None else str(path.resolve())


def _read(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None
