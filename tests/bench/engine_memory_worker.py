"""Peak memory of a training step per rank. Called by test_engine_memory.py with a JSON list of cases; one JSON line a case.

Per case, over ranks: `start` = peak while model and engine are made, `state` = bytes of all tensors between steps, `peak` = peak
resident memory of the second step; the last two above what the process held after its imports. Bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from tests.bench.engine_ranks import fork_ranks, live_bytes, make_batch, make_loss, open_engine, reset_peak, resident_bytes


def measure(case: dict[str, Any]) -> dict[str, Any]:
    # A first small engine of the same kind: what libraries allocate once per process is not the model's.
    warm_up, runtime, config = open_engine({**case, "size": "narrow", "patch": [32, 32, 32]})
    warm_up.step([make_batch(config, runtime.rank)], make_loss(config, runtime.world_size), lr=1e-3)
    del warm_up
    reset_peak()
    nothing, tensors = resident_bytes(), live_bytes()
    engine, runtime, config = open_engine(case, runtime)
    start = resident_bytes("VmHWM") - nothing
    batches = [make_batch(config, runtime.rank)] * case.get("micro_batches", 1)
    loss_fn = make_loss(config, len(batches) * runtime.world_size)
    engine.step(batches, loss_fn, lr=1e-3)
    state = live_bytes() - tensors
    reset_peak()
    rest = resident_bytes() - nothing
    runtime.barrier()
    engine.step(batches, loss_fn, lr=1e-3)
    row = {"start": start, "state": state, "rest": rest, "peak": resident_bytes("VmHWM") - nothing}
    runtime.barrier()
    return row


def main() -> None:
    for case in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as folder:
            rows = fork_ranks(measure, {**case, "folder": folder})
        print(json.dumps({**case, **{key: max(row[key] for row in rows) for key in rows[0]}}), flush=True)


if __name__ == "__main__":
    main()
