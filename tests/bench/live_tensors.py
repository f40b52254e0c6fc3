"""The most bytes that tensors held at one time: what an allocator without waste would need, on any device.

Resident memory adds the allocator's own (freed blocks that it keeps, fragmentation) and the kernels' scratch space.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Inside it `peak_bytes` is kept up to date. Tensors of before (`ignore`: weights, gradients, inputs) do not count."""

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in ignore}
        self._live: dict[int, int] = {}
        self._bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._live[key] = storage.nbytes()
        self._bytes += self._live[key]
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._known.discard(key)
        self._bytes -= self._live.pop(key)
