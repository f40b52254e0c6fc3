"""Engine cases for several ranks, and the single process that they are compared with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.multiproc.ranks import run_ranks
from tests.multiproc.toy import reference_run

WORKER = "tests.multiproc.engine_worker"
BASE: dict[str, Any] = {"steps": 20, "batch": 6, "lr": 0.02}


@cache
def reference(optimizer: str, clip: float = 0.3) -> dict[str, list]:
    return reference_run(optimizer, steps=20, batch=6, lr=0.02, decay=0.01, clip=clip)


def run_cases(cases: list[dict[str, Any]], world_size: int, tmp_path: Path, limit_s: float = 180) -> list[dict[str, Any]]:
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(WORKER, [str(tmp_path / "cases.json"), str(tmp_path / "out.json")], world_size, limit_s)
    return json.loads((tmp_path / "out.json").read_text())


def assert_equal_to_reference(got: dict[str, Any], optimizer: str, label: str) -> None:
    want = reference(optimizer)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5, err_msg=label)
    np.testing.assert_allclose(got["norm"], want["norm"], rtol=1e-4, err_msg=label)
    assert got["names"] == want["names"]
    for name, a, b in zip(got["names"], got["weights"], want["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{label} {name}")
    for name, a, b in zip(got["names"], got["ema"], want["ema"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{label} ema {name}")
