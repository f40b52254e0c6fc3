"""Lack of memory as an error of one scan, so that the others go on.

Three things may raise it: Python and numpy (`MemoryError`), a device (`torch.OutOfMemoryError`), and torch's CPU allocator, whose
error is a plain RuntimeError that is known by its text alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from hermes_dist.errors import HermesError

MARKS = ("DefaultCPUAllocator: ", "error: out of memory")
"""Of torch's CPU allocator; of CUDA and HIP calls outside torch's own allocator."""


@contextmanager
def named_memory_errors(what: str) -> Generator[None]:
    """Work on `what` (a scan, a case): lack of memory becomes a HermesError that names it.

    Raises:
        HermesError: there was not enough memory. Every other error passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip() or "allocation failed").splitlines()[0][:200]
        raise HermesError(
            f"{what}: not enough memory ({said}); set a smaller evaluate.window_vox_zyx, or use a machine or device with more "
            "memory"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
