"""The collection of `tools`, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from hermes_dist.tasks import TaskTable
from tests.stream import tools


@pytest.fixture(scope="session")
def store_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of the collection per format. Not to be written to."""
    return tools.write_both(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def tasks() -> TaskTable:
    """The task table of the collection."""
    return tools.make_tasks()
