"""A scan that overflows in float32 (NaN would have been refused by the store): its steps are skipped and named, and above the
limit the run stops with the last good checkpoint in place.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.config import Config
from hermes_dist.errors import NumericalError
from hermes_dist.parallel.checkpoint import list_checkpoints
from hermes_dist.parallel.runtime import Runtime, start
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import create_store
from hermes_dist.train.trainer import train
from hermes_dist.volume.geometry import Grid
from hermes_dist.volume.preprocess import Preprocessing, place
from tests.train.tiny_run import TASKS, label_of, make_config

STEPS = 4


@pytest.fixture
def runtime() -> Generator[Runtime]:
    session = start(Config())
    yield session
    session.close()


def write_store(folder: Path) -> None:
    """Four good scans and one beyond reason."""
    writer = create_store(str(folder), "zarr", tasks=TASKS, preprocessing=Preprocessing(image_dtype="float32"))
    for name in ("good0", "good1", "good2", "good3", "bad"):
        label = label_of(0, (32, 32, 32))
        image = label.astype(np.float32)
        if name == "bad":
            image = np.where(label % 2 == 0, 3e38, -3e38).astype(np.float32)
        placement = place(Grid(np.diag([-1.5, 1.5, 1.5, 1.0]), label.shape), None, Preprocessing(crop_body=False))
        record = CaseRecord("organs", name, "CT", "train", (1.5, 1.5, 1.5), json.dumps(placement.to_json()), name)
        writer.write_case(record, image, label)
    writer.finish()


@pytest.mark.faults
@pytest.mark.parametrize("allowed", [STEPS, 0])
def test_skipped_steps_name_their_samples(
    allowed: int, tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "store")
    config = make_config(
        tmp_path,
        data={"stores": [str(tmp_path / "store")], "patch_vox_zyx": [32, 32, 32]},
        stream={"backend": "inline"},
        augment={"enabled": False},
        train={"global_batch": 1, "max_steps": 2 * STEPS, "max_skipped": allowed},
        checkpoint={"every_steps": 1, "background": False},
        monitor={"prometheus_port": -1},
    )
    if allowed:
        assert train(config, runtime).step == 2 * STEPS
    else:
        with pytest.raises(NumericalError, match=r"1 steps had NaN.*last good checkpoint.*stream\.jsonl"):
            train(config, runtime)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert skipped
    events = [json.loads(line) for line in (config.run_dir / "stream.jsonl").read_text().splitlines()]
    named = {e["step"]: (e["samples"], e["loss_not_finite"]) for e in events if e["kind"] == "skipped_step"}
    assert named == dict.fromkeys(skipped, (["organs/bad"], ["organs/bad"]))
    assert f"step {skipped[0]} skipped on all ranks: the loss of organs/bad is NaN or Inf" in capsys.readouterr().err
    if not allowed:
        assert list_checkpoints(config.run_dir)[0].step == skipped[0]
