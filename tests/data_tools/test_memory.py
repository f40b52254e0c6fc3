"""Converting one case takes a bounded multiple of its own size, measured as the peak of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

CONVERT = """
import json, resource, sys
from pathlib import Path
from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert, plan_jobs
from data_tools.forecast import peak_bytes
import data_tools.sources.nifti, hermes_dist.shards.zarr_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
collection = read_collection_file(Path(sys.argv[1]))
forecast = peak_bytes(plan_jobs(collection)[0])
report = convert(collection, sys.argv[2], Settings(format=sys.argv[3]), say=print)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
use = resource.getrusage(resource.RUSAGE_SELF)
found = {"bytes": (peak - before) * 1024, "forecast": forecast, "cpu_s": use.ru_utime + use.ru_stime}
print(json.dumps({"counts": report.counts, **found}))
"""


def write_ct(root, shape, spacing, labelled):
    """An uncompressed CT, written plane by plane: noise in a body that fills most of it; every `labelled`-th row is a class."""
    rng = np.random.default_rng(0)
    plane = rng.integers(-80, 200, shape[1:]).astype("<i2")
    plane[: shape[1] // 16], plane[:, : shape[2] // 16] = -1000, -1000
    mask = (plane > -900).astype(np.uint8) * (1 + (np.arange(shape[1])[:, None] // 64) % 5).astype(np.uint8)
    mask[np.arange(shape[1]) % labelled != 0] = 0
    for folder, name, kind, data in (("imagesTr", "big_0000", np.int16, plane), ("labelsTr", "big", np.uint8, mask)):
        header = nib.Nifti1Header()
        header.set_data_dtype(kind)
        header.set_data_shape(shape[::-1])
        header.set_sform(np.diag([*spacing[::-1], 1.0]), 1)
        header["vox_offset"] = 352
        header["magic"] = b"n+1"
        (root / folder).mkdir(parents=True, exist_ok=True)
        with (root / folder / f"{name}.nii").open("wb") as file:
            file.write(header.binaryblock + b"\0" * 4)
            for z in range(shape[0]):
                file.write(np.roll(data, z, axis=1).tobytes())
    labels = {"background": 0, **{f"class_{v}": v for v in range(1, 6)}}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii"}
    (root / "dataset.json").write_text(json.dumps(description))
    return 2 * int(np.prod(shape))


def peak(tmp_path, shape, spacing, *, labelled=1, format="zarr", **preprocessing):
    """(peak above the loaded program / size of the CT in int16, the whole result)."""
    size = write_ct(tmp_path / "Dataset001_Big", shape, spacing, labelled)
    collection = tmp_path / "collection.json"
    entry = {"name": "big", "path": "Dataset001_Big", "layout": "nnunet"}
    collection.write_text(json.dumps({"datasets": [entry], "preprocessing": preprocessing}))
    command = [sys.executable, "-c", CONVERT, str(collection), str(tmp_path / "store"), format]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1700)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["counts"] == {"converted": 1}
    return found["bytes"] / size, found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zarr", "webdataset"])
@pytest.mark.parametrize(
    ("spacing", "target"), [((0.6, 0.5, 0.5), [1.5, 1.5, 1.5]), ((0.6, 0.5, 0.5), None)], ids=["to 1.5 mm", "own spacing"]
)
def test_a_fully_labelled_ct_needs_at_most_four_times_its_size(spacing, target, format, tmp_path):
    times, found = peak(tmp_path, (160, 512, 512), spacing, format=format, spacing_mm_zyx=target)
    assert times <= 4.0
    assert found["bytes"] <= found["forecast"]
