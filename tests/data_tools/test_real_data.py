"""All eighteen real datasets convert with their splits, and come back."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert
from data_tools.inspect_store import restore, verify
from data_tools.sources import SOURCES
from hermes_dist.shards.store import open_store


def mean_dice(a, b):
    values = [v for v in np.unique(np.concatenate([np.unique(a), np.unique(b)])) if v]
    return min(2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in values) if values else 1.0


@pytest.mark.slow
def test_everything_converts_and_comes_back(real_data, tmp_path):
    collection = read_collection_file(real_data / "collection.json")
    url = str(tmp_path / "store")
    report = convert(collection, url, Settings(), say=lambda text: None)
    declared = json.loads((real_data / "collection.json").read_text())["datasets"]
    assert report.counts == {"converted": sum(d["cases"] for d in declared)}
    assert not report.rejected
    store = open_store(url)
    splits = json.loads((real_data / "splits.json").read_text())
    for dataset in collection.datasets:
        rows = [store.manifest.row(int(i)) for i in store.manifest.rows(dataset.name)]
        assert Counter(r.split for r in rows) == Counter({k: len(v) for k, v in splits[dataset.name].items() if v})
        assert not [c for c, name in enumerate(dataset.class_names) if not any(r.class_voxels[c] for r in rows)]
        refs = {c.case_id: c for c in dataset.cases}
        for row in rows[:: max(1, len(rows) // 3)]:
            original = SOURCES[dataset.layout].load(refs[row.case_id])
            restored, placement = restore(store, row, "label")
            assert restored.shape == original.label_zyx.shape
            if max(placement.scale_zyx) <= 1:  # kept or refined on every axis
                assert mean_dice(restored, original.label_zyx) >= 0.99, row.name
    assert verify(url, workers=2) == []


def test_one_dataset_of_each_layout_converts(real_data, tmp_path):
    collection = read_collection_file(real_data / "collection.json")
    wanted = {"glioma_t1c", "cine_heart_lvonly", "spinal_cord_mr", "prostate_t2"}
    collection.datasets = [d for d in collection.datasets if d.name in wanted]
    report = convert(collection, str(tmp_path / "store"), Settings(), say=lambda text: None)
    assert report.counts == {"converted": 4 + 4 + 2 + 21}
    assert not report.rejected
