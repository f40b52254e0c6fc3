"""Writers killed with −9 at random instants: what was published stays whole, the next run goes on, nothing torn is seen."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.shards.store import create_store, open_store
from hermes_dist.shards.verify import case_problems, store_problems
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

pytestmark = [pytest.mark.faults, pytest.mark.multiproc]

WRITER = """
import sys
import numpy as np
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import create_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing
url, form, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
tasks = TaskTable.build([("ct", "CT", "trunk", [("liver", [1])], None)])
writer = create_store(url, form, tasks=tasks, preprocessing=Preprocessing(image_dtype="int16"))
print("ready", flush=True)
for i in range(first, first + 6):
    if writer.existing("ct", f"c{i:02d}") is None:
        image = np.random.default_rng(i).normal(size=(40, 50, 60)).astype(np.float32)
        record = CaseRecord("ct", f"c{i:02d}", "CT", "train", (1, 1, 1), "{}", f"h{i}")
        writer.write_case(record, image, (image > 1).astype(np.uint8))
if len(sys.argv) > 4:
    writer.finish()
"""


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_kill_and_go_on(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(3)
    url = str(tmp_path / "store")

    def start(first: int, *more: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", WRITER, url, form, str(first), *more], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    for _ in range(3):
        for writer in [start(0), start(6)]:
            time.sleep(float(rng.uniform(0, 0.1)))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    assert start(0).wait() == 0
    assert start(6, "finish").wait() == 0
    store = open_store(url)
    assert store.manifest.case_ids == [f"c{i:02d}" for i in range(12)]
    assert list(store_problems(store)) == []
    assert [p for i in range(12) for p in case_problems(store, store.manifest.row(i))] == []
    assert not [p for p in Path(url).rglob("*") if p.name.endswith(".tmp") or ".staging" in p.parts]

    tasks = TaskTable.build([("ct", "CT", "trunk", [("liver", [1])], None)])
    fresh = create_store(str(tmp_path / "once"), form, tasks=tasks, preprocessing=Preprocessing(image_dtype="int16"))
    assert start(0, "finish").wait() == 0, "a finished store may be finished again"
    assert open_store(url).collection.digest == store.collection.digest
    assert fresh.existing("ct", "c00") is None
