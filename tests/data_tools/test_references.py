"""Raw labels for evaluation: the annotated map of a stored case, on its own grid."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert
from data_tools.references import RawReferences
from hermes_dist.errors import DataError
from hermes_dist.shards.store import open_store


@pytest.fixture
def converted(nnunet, tmp_path):
    """(collection file, store's manifest rows, dataset folder)."""
    collection = tmp_path / "collection.json"
    collection.write_text(json.dumps({"datasets": [{"name": "toy", "path": nnunet.name}]}))
    convert(read_collection_file(collection), str(tmp_path / "store"), Settings(workers=0), say=lambda _: None)
    manifest = open_store(str(tmp_path / "store")).manifest
    return collection, [manifest.row(i) for i in range(len(manifest))], nnunet


def test_the_label_as_annotated(converted, raw):
    collection, rows, _ = converted
    references = RawReferences(collection)
    assert len(rows) == 4
    for row in rows:
        label = references(row)
        np.testing.assert_array_equal(label, raw.make_volume(int(row.case_id[-1]))[1])


def test_the_digest_tells_collections_apart(converted):
    collection, _, _ = converted
    digest = RawReferences(collection).digest
    assert RawReferences(collection).digest == digest
    data = json.loads(collection.read_text())
    data["datasets"][0]["include"] = "case_[12]"
    collection.write_text(json.dumps(data))
    assert RawReferences(collection).digest != digest


def test_a_case_of_another_collection_is_named(converted, capsys):
    collection, rows, folder = converted
    for part in ("imagesTr/case_0_0000.nii.gz", "labelsTr/case_0.nii.gz"):
        (folder / part).unlink()
    assert RawReferences(collection)(next(r for r in rows if r.case_id == "case_0")) is None
    assert "toy/case_0 is not in" in capsys.readouterr().err


def test_a_label_that_changed_since_is_refused(converted, raw):
    collection, rows, folder = converted
    _, label, affine = raw.make_volume(0)
    raw.save(folder / "labelsTr" / "case_0.nii.gz", label[:-1], affine)
    with pytest.raises(DataError, match=r"toy/case_0|case_0\.nii\.gz"):
        RawReferences(collection)(next(r for r in rows if r.case_id == "case_0"))
