"""Going back: `run.resume=PATH` with one of the run's own checkpoints makes it the newest, and what came after it abandoned.

    RUN/checkpoints/rolled_back                  name of the checkpoint that the run went back to
                   /abandoned-step_00003000/     a newer one, out of the way: never resumed from, never deleted by the run

The same command may be started again after an interruption. By then the file names that checkpoint, so every newer one was
written since: the newest of them is taken. All of this is done by rank 0 alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.fragments import write_bytes
from hermes_dist.parallel.stored import Stored, list_checkpoints, open_checkpoint

_MARK = "rolled_back"
_NAME = re.compile(r"step_(\d+)")
_ABANDONED = "abandoned-"


def own_step(root: Path, path: Path) -> int | None:
    """The step of `path` if it is (or was) one of the checkpoints in `root`; None for one of another run.

    Raises:
        CheckpointError: it is one that this run abandoned.
    """
    if path.resolve().parent != root.resolve():
        return None
    name = path.resolve().name
    if name.startswith(_ABANDONED):
        raise CheckpointError(
            f"{path} was abandoned when the run went back to an older checkpoint; to return to it, rename it to "
            f"{name.removeprefix(_ABANDONED)!r} and name it in run.resume"
        )
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def candidates(run_dir: Path, path: Path) -> tuple[list[Stored], int | None]:
    """What `run.resume=path` may resume from, the best first; and the step to go back to, if that is to be done now."""
    root = run_dir / "checkpoints"
    step = own_step(root, path)
    if step is None:
        return [open_checkpoint(path)], None
    if _read(root / _MARK) != path.resolve().name:
        return [open_checkpoint(path)], step
    found = [stored for stored in list_checkpoints(run_dir) if stored.step >= step]
    return found or [open_checkpoint(path)], None


def note(root: Path, path: Path, taken: Path) -> str | None:
    """What to say where a restart takes a newer checkpoint than the one that was named."""
    if taken.name == path.name:
        return None
    return (
        f"goes on from {taken.name}, written since the run went back to {path.name}; "
        f"to go back to {path.name} once more, delete {root / _MARK}"
    )


def go_back(root: Path, step: int) -> list[str]:
    """Abandon all checkpoints after `step`. Returns their names. Killed half-way, the next start does the rest."""
    kept = f"step_{step:08d}"
    newer = [path for path in sorted(root.glob("step_*")) if (m := _NAME.fullmatch(path.name)) and int(m[1]) > step]
    for path in newer:
        target, number = root / f"{_ABANDONED}{path.name}", 2
        while target.exists():
            target, number = root / f"{_ABANDONED}{path.name}-{number}", number + 1
        path.rename(target)
    if _read(root / "best") in {path.name for path in newer}:
        (root / "best").unlink()
    write_bytes(root / "latest", f"{kept}\n".encode())
    write_bytes(root / _MARK, f"{kept}\n".encode())
    return [path.name for path in newer]


def forget(root: Path) -> None:
    """A start with `run.resume=auto`: naming the same checkpoint later is a new decision to go back."""
    (root / _MARK).unlink(missing_ok=True)


def _read(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None
