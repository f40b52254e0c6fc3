"""What all tests share: where the real data lies, and threads that suit two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans: $HERMES_DATA, else ../shared/data beside the checkout; skipped where absent."""
    path = Path(os.environ.get("HERMES_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "collection.json").is_file():
        pytest.skip(f"real data not found at {path}; set HERMES_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def reference_vectors() -> Path:
    """Folder of reference vectors: $HERMES_REFERENCE, else ../shared/reference; skipped where absent."""
    path = Path(os.environ.get("HERMES_REFERENCE", ROOT.parent / "shared" / "reference"))
    if not path.is_dir():
        pytest.skip(f"reference vectors not found at {path}; set HERMES_REFERENCE to their folder")
    return path
