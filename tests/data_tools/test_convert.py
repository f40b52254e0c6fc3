"""Conversion as a whole: resumable, incremental, in parts, and honest about what it leaves out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from data_tools.collection import collection_of_sources, read_collection_file
from data_tools.convert import Settings, check, convert, existing_splits, merge, plan_jobs
from data_tools.inspect_store import find_case, restore
from data_tools.jobs import Target, run_job
from data_tools.journal import Journal
from hermes_dist.errors import StoreError, UsageError
from hermes_dist.shards.storage import LocalStorage
from hermes_dist.shards.store import create_store, open_store
from tests.data_tools.conversion import QUIET, run


def voxels(out):
    store = open_store(str(out))
    return {store.manifest.row(i).name: store.manifest.row(i).data_hash for i in range(len(store.manifest))}


def test_again_changed_added_and_removed(nnunet, tmp_path, raw):
    out = tmp_path / "store"
    first = run(nnunet, out)
    assert first.counts == {"converted": 4}
    assert first.collection.n_cases == 4
    assert run(nnunet, out).counts == {"unchanged": 4}
    assert open_store(str(out)).collection.digest == first.collection.digest
    image, label, affine = raw.make_volume(50)
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", image, affine)
    raw.save(nnunet / "labelsTr" / "case_1.nii.gz", label, affine)
    image, label, affine = raw.make_volume(51)
    raw.save(nnunet / "imagesTr" / "new_0000.nii.gz", image, affine)
    raw.save(nnunet / "labelsTr" / "new.nii.gz", label, affine)
    (nnunet / "imagesTr" / "case_3_0000.nii.gz").unlink()
    (nnunet / "labelsTr" / "case_3.nii.gz").unlink()
    before = existing_splits(str(out))
    report = run(nnunet, out)
    assert report.counts == {"converted": 2, "unchanged": 2}
    assert report.removed == [("Toy", "case_3")]
    assert set(voxels(out)) == {"Toy/case_0", "Toy/case_1", "Toy/case_2", "Toy/new"}
    after = existing_splits(str(out))
    assert all(after[k] == before[k] for k in after.keys() & before.keys())


def test_other_parameters_convert_again(nnunet, tmp_path):
    out = tmp_path / "store"
    run(nnunet, out)
    collection = collection_of_sources([nnunet])
    collection.preprocessing = collection.preprocessing.model_copy(update={"spacing_mm_zyx": (3.0, 3.0, 3.0)})
    assert convert(collection, str(out), Settings(), **QUIET).counts == {"converted": 4}


def test_ct_without_its_rescale_intercept_is_warned_of(nnunet, raw):
    assert not check(collection_of_sources([nnunet])).findings
    image, _, affine = raw.make_volume(0)
    raw.save(nnunet / "imagesTr" / "case_0_0000.nii.gz", image + 1024, affine)
    (finding,) = check(collection_of_sources([nnunet])).findings
    assert (finding.case_id, finding.check, finding.severity) == ("case_0", "intensity", "warn")
    assert "none below 0" in finding.message
    assert not check(collection_of_sources([nnunet], modality="T1")).findings


def test_an_interrupted_conversion_goes_on(nnunet, tmp_path):
    """Cases that were published before the kill are not converted again, and the result is the same."""
    out, whole = tmp_path / "store", tmp_path / "whole"
    run(nnunet, whole)
    collection = collection_of_sources([nnunet])
    writer = create_store(str(out), "zarr", tasks=collection.task_table(), preprocessing=collection.preprocessing)
    for job in plan_jobs(collection)[:2]:
        run_job(job, Target(writer, Journal(str(out))))
    with pytest.raises(StoreError):
        open_store(str(out))
    assert run(nnunet, out).counts == {"unchanged": 2, "converted": 2}
    assert voxels(out) == voxels(whole)
    assert open_store(str(out)).collection.digest == open_store(str(whole)).collection.digest


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_parts_then_merge_equal_one_conversion(format, nnunet, tmp_path):
    out, whole = tmp_path / "store", tmp_path / "whole"
    run(nnunet, whole, format=format)
    counts = [run(nnunet, out, format=format, part=(i, 3)).counts["converted"] for i in (1, 2)]
    missing = 4 - sum(counts)
    if missing:
        with pytest.raises(StoreError, match=f"{missing} cases were not converted"):
            merge(str(out))
    run(nnunet, out, format=format, part=(3, 3))
    assert merge(str(out)).collection.digest == open_store(str(whole)).collection.digest
    with pytest.raises(StoreError, match="no unfinished conversion"):
        merge(str(out))


def test_bad_cases_are_quarantined_and_the_rest_converts(nnunet, tmp_path, raw):
    image, label, _ = raw.make_volume(9)
    cut = nnunet / "imagesTr" / "case_0_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[:500])
    broken = image.astype(np.float32)
    broken[3, 3, 3] = np.nan
    raw.save(nnunet / "imagesTr" / "case_1_0000.nii.gz", broken, raw.make_volume(1)[2])
    label[0, 0, 0] = 9
    raw.save(nnunet / "labelsTr" / "case_2.nii.gz", label, raw.make_volume(2)[2])
    report = run(nnunet, tmp_path / "store")
    assert report.counts == {"rejected": 3, "converted": 1}
    found = {f.case_id: f.check for f in report.rejected}
    assert found == {"case_0": "truncated", "case_1": "nan", "case_2": "undeclared label"}
    rows = json.loads((tmp_path / "store" / "integrity.json").read_text())
    assert list(rows[0]) == ["dataset", "case_id", "file", "check", "severity", "message", "suggestion"]
    assert all(r["file"] and r["suggestion"] for r in rows if r["severity"] == "reject")
    assert set(voxels(tmp_path / "store")) == {"Toy/case_3"}
    again = run(nnunet, tmp_path / "store")
    assert again.counts == {"rejected": 3, "unchanged": 1}
    assert {f.check for f in again.findings} == {f.check for f in report.findings}


def test_nothing_but_bad_cases_publishes_nothing(nnunet, tmp_path):
    for file in (nnunet / "imagesTr").iterdir():
        file.write_bytes(b"")
    with pytest.raises(StoreError, match="every case was rejected"):
        run(nnunet, tmp_path / "store")
    assert (tmp_path / "store" / "integrity.json").is_file()


@pytest.mark.parametrize(
    ("change", "verdict", "check_name"),
    [
        ("shifted label", "reject", "label grid"),
        ("nearly the same label grid", "note", "label grid"),
        ("other shape", "reject", "label grid"),
        ("half values", "reject", "label"),
        ("whole floats", "note", "label type"),
        ("empty label", "warn", "empty label"),
        ("constant image", "reject", "constant"),
        ("shear", "reject", "shear"),
        ("huge spacing", "reject", "spacing"),
        ("infinite", "reject", "nan"),
    ],
)
def test_every_oddity_has_its_verdict(change, verdict, check_name, tmp_path, raw):
    root = raw.make_nnunet(tmp_path / "Dataset001_Toy", cases=1)
    image, label, affine = raw.make_volume(0)
    image_affine, label_affine = affine.copy(), affine.copy()
    if change == "shifted label":
        label_affine[0, 3] += 3
    elif change == "nearly the same label grid":
        label_affine[0, 3] += 0.01
    elif change == "other shape":
        label = label[:-1]
    elif change == "half values":
        label = label * np.float32(0.5)
    elif change == "whole floats":
        label = label.astype(np.float32)
    elif change == "empty label":
        label = label * 0
    elif change == "constant image":
        image = image * 0
    elif change == "shear":
        image_affine[0, 2] = label_affine[0, 2] = 1.0
    elif change == "huge spacing":
        image_affine = label_affine = np.diag([1500.0, 1500.0, 3000.0, 1.0])
    elif change == "infinite":
        image = image.astype(np.float32)
        image[0, 0, 0] = np.inf
    import nibabel as nib

    for folder, name, array, a in (("imagesTr", "case_0_0000", image, image_affine), ("labelsTr", "case_0", label, label_affine)):
        scan = nib.Nifti1Image(np.ascontiguousarray(array.T), None)
        scan.set_sform(a, 1)
        nib.save(scan, root / folder / f"{name}.nii.gz")
    report = check(collection_of_sources([root]))
    assert (check_name, verdict) in {(f.check, f.severity) for f in report.findings}
    assert bool(report.rejected) == (verdict == "reject")


def test_files_of_an_unknown_kind_are_named(tmp_path, raw):
    root = raw.make_nnunet(tmp_path / "Dataset001_Toy", cases=1)
    for file in (*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".png")))
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**description, "file_ending": ".png"}))
    (finding,) = check(collection_of_sources([root])).rejected
    assert finding.check == "unreadable"
    assert "no reader for this file ending" in finding.message


def test_copies_across_splits_are_leakage_and_within_a_split_a_warning(nnunet, tmp_path):
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        shutil.copy(nnunet / folder / f"case_0{suffix}.nii.gz", nnunet / folder / f"copy{suffix}.nii.gz")
        shutil.copy(nnunet / folder / f"case_1{suffix}.nii.gz", nnunet / folder / f"twin{suffix}.nii.gz")
    entry = {"name": "toy", "path": nnunet.name, "layout": "nnunet"}
    splits = {"toy": {"train": ["case_0", "case_1", "twin", "case_2"], "val": [], "test": ["copy", "case_3"]}}
    (tmp_path / "c.json").write_text(json.dumps({"datasets": [entry], "splits": splits}))
    report = convert(read_collection_file(tmp_path / "c.json"), str(tmp_path / "store"), Settings(), **QUIET)
    assert [(f.check, f.case_id) for f in report.rejected] == [("leakage", "case_0")]
    assert [(f.case_id, f.severity) for f in report.findings if f.check == "duplicate"] == [("twin", "warn")]
    assert set(voxels(tmp_path / "store")) == {"toy/case_1", "toy/case_2", "toy/case_3", "toy/copy", "toy/twin"}


def test_a_dataset_is_never_dropped_by_accident(nnunet, tmp_path, raw):
    other = raw.make_nnunet(tmp_path / "Dataset002_Other", seed=20)
    out = tmp_path / "store"
    convert(collection_of_sources([nnunet, other]), str(out), Settings(), **QUIET)
    with pytest.raises(UsageError, match="--prune"):
        run(nnunet, out)
    assert run(nnunet, out, prune=True).collection.n_cases == 4


def test_labels_and_images_return_to_the_original_grid(nnunet, tmp_path, raw):
    out = tmp_path / "store"
    run(nnunet, out)
    store = open_store(str(out))
    image, label, affine = raw.make_volume(0)
    restored, placement = restore(store, find_case(store, "case_0"), "label")
    np.testing.assert_array_equal(restored, label)
    np.testing.assert_allclose(placement.original.affine, affine, atol=1e-4)
    back, _ = restore(store, find_case(store, "Toy/case_0"), "image")
    assert back.shape == image.shape
    with pytest.raises(UsageError, match="Did you mean 'case_"):
        find_case(store, "case_O")


@pytest.mark.multiproc
def test_ray_workers_write_the_same_store(nnunet, tmp_path):
    run(nnunet, tmp_path / "one")
    run(nnunet, tmp_path / "two", workers=2)
    assert voxels(tmp_path / "one") == voxels(tmp_path / "two")


@pytest.mark.parametrize("stage", ["manifest.parquet", "collection.json", "conversion.jsonl", "integrity.json"])
def test_a_kill_while_publishing_an_increment_goes_on(stage, nnunet, tmp_path, raw, monkeypatch):
    """Manifest and collection are two objects: between their writes neither the old store nor the new one is whole."""
    out = tmp_path / "store"
    run(nnunet, out)
    for i in (7, 8):
        image, label, affine = raw.make_volume(50 + i)
        raw.save(nnunet / "imagesTr" / f"case_{i}_0000.nii.gz", image, affine)
        raw.save(nnunet / "labelsTr" / f"case_{i}.nii.gz", label, affine)
    write = LocalStorage.write

    def killed(self, path, data):
        if path == stage:
            raise KeyboardInterrupt
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(nnunet, out)
    report = run(nnunet, out)
    assert report.counts == {"unchanged": 6}
    assert report.collection.n_cases == len(open_store(str(out)).manifest) == 6
    run(nnunet, tmp_path / "whole")
    assert voxels(out) == voxels(tmp_path / "whole")
    assert not list((out / ".staging").rglob("*.json"))
