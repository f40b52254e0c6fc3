"""Peak memory of converting a CT of 1024 × 1024 × 1500 voxels, all of it labelled: 3.1 GB in int16, 4.7 GB of files.

Needs about 5 GB of disk and 12 GB of memory. Run: `pytest -m bench -s tests/bench/test_convert_memory.py`.
"""

from __future__ import annotations

import pytest

from tests.data_tools.test_memory import peak

SHAPE = (1500, 1024, 1024)


@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", [[1.5, 1.5, 1.5], None], ids=["to 1.5 mm", "own spacing"])
def test_a_large_ct(target, tmp_path):
    times, found = peak(tmp_path, SHAPE, (0.6, 0.4, 0.4), spacing_mm_zyx=target)
    print(f"\n{SHAPE}, spacing {target}: {found['bytes'] / 1e9:.2f} GB, {times:.2f} × the CT, {found['cpu_s']:.0f} CPU s")
    assert times <= 4
