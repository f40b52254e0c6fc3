"""Conversion on a bad day: storage that fails, memory that runs out, files with absurd values, kills in awkward places."""

from __future__ import annotations

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from data_tools.collection import collection_of_sources, read_collection_file
from data_tools.convert import Settings, convert, existing_splits, plan_jobs
from data_tools.forecast import WORKER_BYTES, forecast, peak_bytes, stored_voxels
from data_tools.sources import SOURCES
from hermes_dist.errors import DataError, HermesError, StoreError, TransientStorageError
from hermes_dist.shards.store import open_store
from hermes_dist.shards.verify import case_problems
from hermes_dist.shards.writer import StoreWriter
from tests.data_tools.conversion import QUIET, run


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


@pytest.mark.parametrize("oddity", ["mostly background", "CT of another unit", "far apart"])
def test_an_image_that_would_become_zeros_is_rejected(oddity, nnunet, tmp_path, raw):
    image, _, affine = raw.make_volume(1)
    if oddity != "CT of another unit":
        description = json.loads((nnunet / "dataset.json").read_text())
        (nnunet / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "T1"}}))
    if oddity == "far apart":
        image = image.astype(np.float32)
        image[:2], image[2:] = -3.3e38, 3.3e38
    elif oddity == "mostly background":
        image = image * 0
        image[0, 0, 0] = image[-1, -1, -1] = 400
    else:
        image = image + 5000
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", image, affine)
    report = run(nnunet, tmp_path / "store", spacing=1.5)
    assert cases(tmp_path / "store") == ["case_0", "case_2", "case_3"]
    (finding,) = report.rejected
    assert finding.case_id == "case_1"
    expected = {
        "mostly background": r"constant after clipping to \[0, 0\], its own percentiles 2 and 98",
        "CT of another unit": r"constant after clipping to \[-990, 500\] HU",
        "far apart": "too far apart",
    }
    assert re.search(expected[oddity], finding.message)
    assert finding.suggestion


def test_an_image_in_tiny_units_keeps_its_contrast(nnunet, tmp_path, raw):
    description = json.loads((nnunet / "dataset.json").read_text())
    (nnunet / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "ADC"}}))
    image, _, affine = raw.make_volume(1)
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", (image + 1000).astype(np.float32) * np.float32(1e-12), affine)
    assert run(nnunet, tmp_path / "store").counts == {"converted": 4}
    store = open_store(str(tmp_path / "store"))
    assert store.read_case(1)[0].std() == pytest.approx(1, abs=1e-2)


def test_a_value_beyond_single_precision_costs_one_case(nnunet, tmp_path, raw):
    """It became infinite, NaN after resampling, and ended the whole conversion, at every try."""
    image, _, affine = raw.make_volume(1)
    image = image.astype(np.float64)
    image[3, 3, 3] = 1e39
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", image, affine)
    report = run(nnunet, tmp_path / "store")
    assert report.counts == {"converted": 3, "rejected": 1}
    assert [(f.case_id, f.check) for f in report.rejected] == [("case_1", "intensity")]
    assert "1e+39" in report.rejected[0].message
    assert run(nnunet, tmp_path / "store").counts == {"unchanged": 3, "rejected": 1}


def test_voxels_that_the_store_refuses_cost_one_case(nnunet, tmp_path, monkeypatch):
    write = StoreWriter.write_case

    def refuse(self, record, image_zyx, label_zyx):
        if record.case_id == "case_2":
            raise DataError("Toy/case_2: the image holds NaN")
        return write(self, record, image_zyx, label_zyx)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_case", refuse)
        report = run(nnunet, tmp_path / "store")
    assert [(f.case_id, f.check) for f in report.rejected] == [("case_2", "not storable")]
    assert cases(tmp_path / "store") == ["case_0", "case_1", "case_3"]
    assert run(nnunet, tmp_path / "store").counts == {"unchanged": 3, "converted": 1}


def test_a_resume_needs_no_space_for_what_is_stored(nnunet, tmp_path, monkeypatch):
    """A conversion that just fits, killed near its end, was refused for lack of space."""
    out = tmp_path / "store"
    run(nnunet, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    said = []
    collection = collection_of_sources([nnunet], known_splits=existing_splits(str(out)))
    assert convert(collection, str(out), Settings(), say=said.append).counts == {"unchanged": 4}
    assert "4 more are stored already" in said[0]
    with pytest.raises(StoreError, match="0 B are free"):
        run(nnunet, out, spacing=3.0)


def set_header(nnunet, affine_mm):
    """Give both files of case_1 another affine."""
    for file in (nnunet / "imagesTr" / "case_1_0000.nii.gz", nnunet / "labelsTr" / "case_1.nii.gz"):
        scan = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), None)
        scan.set_sform(np.diag([affine_mm] * 3 + [1.0]), 1)
        scan.header["qform_code"] = 0
        nib.save(scan, file)


@pytest.mark.parametrize("spacing_mm", [500.0, 1e30])
def test_an_absurd_header_does_not_fill_the_forecast(spacing_mm, nnunet):
    """Half a metre a voxel forecast terabytes for the whole conversion; 1e30 ended it with a traceback."""
    sane = forecast(plan_jobs(collection_of_sources([nnunet])))
    set_header(nnunet, spacing_mm)
    jobs = plan_jobs(collection_of_sources([nnunet]))
    assert stored_voxels(jobs[1]) == 0
    assert peak_bytes(jobs[1]) == WORKER_BYTES
    assert forecast(jobs).measured_cases == 3
    assert forecast(jobs).stored_bytes == pytest.approx(sane.stored_bytes, rel=0.01)


def test_a_header_that_declares_more_than_the_file_holds_counts_as_none(nnunet):
    file = nnunet / "imagesTr" / "case_1_0000.nii.gz"
    header = nib.Nifti1Header()
    header.set_data_shape((2000, 2000, 1000))
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = b"n+1", 352
    file.write_bytes(header.binaryblock + bytes(4))
    assert stored_voxels(plan_jobs(collection_of_sources([nnunet]))[1]) == 0


def test_a_scan_that_resampling_would_blow_up_is_rejected_before_memory_is_taken(nnunet, tmp_path):
    set_header(nnunet, 90.0)  # possible, if odd; 12 voxels of it are a metre
    report = run(nnunet, tmp_path / "store", spacing=0.5)
    assert [(f.case_id, f.check) for f in report.rejected] == [("case_1", "size")]
    assert "spacing 90 × 90 × 90 mm" in report.rejected[0].message


def test_a_label_value_that_is_no_longer_declared_is_noticed(nnunet, tmp_path, raw):
    """`check` rejected the case and `convert` called it unchanged."""
    _, label, affine = raw.make_volume(1)
    label[0, 0, 0] = 7
    raw.save(nnunet / "labelsTr" / "case_1.nii.gz", label, affine)
    reports = []
    for extra in ({"other_values": [7]}, {}):
        entry = {"name": "Toy", "path": nnunet.name, "layout": "nnunet", **extra}
        (tmp_path / "c.json").write_text(json.dumps({"datasets": [entry]}))
        known = existing_splits(str(tmp_path / "store"))
        collection = read_collection_file(tmp_path / "c.json", known)
        reports.append(convert(collection, str(tmp_path / "store"), Settings(), **QUIET))
    assert reports[0].counts == {"converted": 4}
    assert [f.check for f in reports[1].rejected] == ["undeclared label"]


def test_a_copy_of_another_type_and_axis_order_is_a_duplicate(nnunet, tmp_path):
    for folder, name, copy in (("imagesTr", "case_1_0000", "copy_0000"), ("labelsTr", "case_1", "copy")):
        scan = nib.load(nnunet / folder / f"{name}.nii.gz")
        dtype = np.float32 if folder == "imagesTr" else np.uint8
        scan = nib.Nifti1Image(np.asarray(scan.dataobj).astype(dtype), scan.affine)
        turned = scan.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        turned.header.set_xyzt_units("mm")
        nib.save(turned, nnunet / folder / f"{copy}.nii.gz")
    report = run(nnunet, tmp_path / "store")
    found = [f for f in report.findings if f.check in ("duplicate", "leakage")]
    assert len(found) == 1
    assert {"case_1", "copy"} == {found[0].case_id, re.search(r"Toy/(\w+)", found[0].message)[1]}
