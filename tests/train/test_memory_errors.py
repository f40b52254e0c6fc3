"""Lack of memory under each of its names, and nothing else, becomes a named error."""

from __future__ import annotations

import pytest
import torch

from hermes_dist.errors import HermesError
from hermes_dist.train.memory_errors import named_memory_errors

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError(CPU),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_lack_of_memory_is_named(error):
    with pytest.raises(HermesError, match=r"^scan 7: not enough memory \([^\n]+\); set a smaller"), named_memory_errors("scan 7"):
        raise error


def test_what_torch_says_on_this_machine_is_known():
    with pytest.raises(HermesError, match="not enough memory"), named_memory_errors("scan"):
        torch.empty(2**55, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shapes differ$"), named_memory_errors("scan"):
        raise RuntimeError("shapes differ")
