"""A reader in another process: storage that fails for a while while it opens its stores."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.errors import StreamError, TransientStorageError
from hermes_dist.shards import retry
from hermes_dist.shards import store as store_module
from hermes_dist.stream import reader as reader_module
from hermes_dist.stream.prepare import build_reader
from tests.stream.tools import make_config, make_tasks, write_store


def failing(times: int) -> Any:
    """`open_store` that is throttled so often first."""
    opened, left = store_module.open_store, [times]

    def open_store(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise TransientStorageError("s3://bucket/store/collection.json: 503 SlowDown")
        return opened(*arguments, **options)

    return open_store


def test_a_worker_that_opens_throttled_stores_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "store", "zarr", n_cases=1)
    reader, _ = build_reader(make_config(), [store], make_tasks())
    sent = pickle.dumps(reader)
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr(store_module, "open_store", failing(3))
    rows = reader.plan.rows(0, 1)
    assert reader_module.open_pickled(sent).read(rows, 0).identity == reader.read(rows, 0).identity
    assert len(pauses) == 3
    assert pauses == sorted(pauses), "they grow"
    monkeypatch.setattr(store_module, "open_store", failing(100))
    with pytest.raises(StreamError, match="could not open the stores in 8 attempts.*503 SlowDown"):
        reader_module.open_pickled(sent)
