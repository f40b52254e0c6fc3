"""What options of evaluate and predict mean on this machine, and the errors of those that it cannot honour."""

from __future__ import annotations

import errno
import os
from argparse import ArgumentTypeError
from pathlib import Path

import torch

from hermes_dist.errors import UsageError


def to_device(text: str) -> torch.device:
    """A `--device` option. Raises ArgumentTypeError for what torch does not know, or this machine does not have."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"device {text!r} is unknown; expected cpu, cuda or cuda:1") from None
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ArgumentTypeError(f"device {text!r} is not here: torch sees {there} CUDA device(s); leave --device out to choose")
    return device


def to_count(text: str) -> int:
    """An option that counts something. Raises ArgumentTypeError for anything but a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def use_cores(threads: int | None = None) -> None:
    """CPU threads of inference: as given, else this process's share of the host's cores (there are no data workers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def require_folder(folder: Path) -> None:
    """Make the folder for results. Raises UsageError where that is not possible: before hours of work rather than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written to ({error.strerror}); name a folder that can") from None
