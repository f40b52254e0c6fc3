"""Conversion on a bad day: storage that fails, memory that runs out, files with absurd values, kills in awkward places."""

from __future__ import annotations

import pytest

from data_tools.collection import collection_of_sources
from data_tools.convert import Settings, convert, existing_splits
from data_tools.sources import SOURCES
from hermes_dist.errors import HermesError, StoreError, TransientStorageError
from hermes_dist.shards.store import open_store
from hermes_dist.shards.verify import case_problems
from hermes_dist.shards.writer import StoreWriter

QUIET = {"say": lambda text: None}


def run(source, out, *, spacing=None, **settings):
    collection = collection_of_sources([source], known_splits=existing_splits(str(out)))
    if spacing:
        collection.preprocessing = collection.preprocessing.model_copy(update={"spacing_mm_zyx": (spacing,) * 3})
    return convert(collection, str(out), Settings(**settings), **QUIET)


def cases(out):
    return open_store(str(out)).manifest.case_ids


def problems(out):
    store = open_store(str(out))
    return [p for i in range(len(store.manifest)) for p in case_problems(store, store.manifest.row(i))]


def test_a_storage_hiccup_costs_no_case(nnunet, tmp_path, monkeypatch):
    """A case whose row could not be asked for was quarantined, left out of the manifest, and its bytes deleted."""
    out = tmp_path / "store"
    run(nnunet, out)
    asked = StoreWriter.existing

    def existing(self, dataset, case_id):
        if case_id == "case_1":
            raise TransientStorageError("503 slow down")
        return asked(self, dataset, case_id)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "existing", existing)
        with pytest.raises(TransientStorageError, match="503"):
            run(nnunet, out)
    assert len(cases(out)) == 4
    assert problems(out) == []
    assert run(nnunet, out).counts == {"unchanged": 4}


def test_a_store_without_its_manifest_is_no_empty_store(nnunet, tmp_path):
    """Splits were drawn anew, and every case rejected."""
    run(nnunet, tmp_path / "store")
    (tmp_path / "store" / "manifest.parquet").unlink()
    with pytest.raises(StoreError, match=r"manifest.parquet does not exist.*restore it"):
        existing_splits(str(tmp_path / "store"))
    assert existing_splits(str(tmp_path / "nothing")) == {}


def test_lack_of_memory_rejects_no_case(nnunet, tmp_path, monkeypatch, raw):
    out = tmp_path / "store"
    run(nnunet, out)
    image, _, affine = raw.make_volume(60)
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", image, affine)

    def load(case):
        raise MemoryError("Unable to allocate 9 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(SOURCES["nnunet"], "load", load)
        with pytest.raises(HermesError, match=r"case_1_0000.*not enough memory.*9 GiB.*fewer workers"):
            run(nnunet, out)
    assert len(cases(out)) == 4
