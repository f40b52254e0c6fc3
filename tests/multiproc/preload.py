"""What a rank imports in its first seconds; the server of `ranks` imports it once, before it forks."""

from __future__ import annotations

import os
from importlib import import_module

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

# The first two are what `deepspeed.initialize` and the first optimizer load.
for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "hermes_dist.train.trainer"):
    import_module(name)
