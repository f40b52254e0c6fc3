"""Every layout is recognised, listed and read; what is missing is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from data_tools.collection import detect_layout
from data_tools.findings import RejectedError
from data_tools.sources import SOURCES
from hermes_dist.errors import SourceError


def opened(path, layout=None, **options):
    name = detect_layout(path)
    assert layout in (None, name)
    return SOURCES[name], SOURCES[name].open(path, options)


def test_nnunet_with_regions_ignore_splits_and_missing_pairs(nnunet, raw):
    description = json.loads((nnunet / "dataset.json").read_text())
    description["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    (nnunet / "dataset.json").write_text(json.dumps(description))
    folds = [{"train": ["case_0", "case_1"], "val": ["case_2"]}, {"train": ["case_2"], "val": ["case_1"]}]
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    (nnunet / "imagesTr" / "._case_0_0000.nii.gz").write_bytes(b"junk")
    (nnunet / "imagesTr" / "odd.nii.gz").write_bytes(b"")
    shutil.copy(nnunet / "imagesTr" / "case_0_0000.nii.gz", nnunet / "imagesTr" / "lonely_0000.nii.gz")
    shutil.copy(nnunet / "labelsTr" / "case_0.nii.gz", nnunet / "labelsTr" / "widow.nii.gz")
    source, dataset = opened(nnunet, "nnunet")
    assert dataset.classes == [("whole", (1, 2)), ("core", (2,))]
    assert (dataset.ignore_value, dataset.modality) == (3, "CT")
    assert dataset.splits == {"train": ["case_0", "case_1"], "val": ["case_2"], "test": ["case_3"]}
    assert [c.case_id for c in dataset.cases] == [f"case_{i}" for i in range(4)]
    found = {(f.check, f.severity, f.case_id) for f in dataset.findings}
    assert {("missing pair", "reject", "lonely"), ("missing pair", "warn", "widow"), ("name", "warn", "")} <= found
    case = source.load(dataset.cases[0])
    assert case.digest == source.fingerprint(dataset.cases[0])
    np.testing.assert_array_equal(case.image_zyx, raw.make_volume(0)[0])
    assert SOURCES["nnunet"].open(nnunet, {"fold": 1}).splits["train"] == ["case_2"]


def test_nnunet_channels_and_file_map(tmp_path, raw):
    image, label, affine = raw.make_volume()
    for channel in range(2):
        raw.save(tmp_path / "elsewhere" / f"x_{channel}.nii.gz", image + channel, affine)
    raw.save(tmp_path / "elsewhere" / "x_seg.nii.gz", label, affine)
    description = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "dataset": {"x": {"images": ["elsewhere/x_0.nii.gz", "elsewhere/x_1.nii.gz"], "label": "elsewhere/x_seg.nii.gz"}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    source, dataset = opened(tmp_path, "nnunet", channel=1)
    assert dataset.modality == "FLAIR"
    np.testing.assert_array_equal(source.load(dataset.cases[0]).image_zyx, image + 1)
    assert [f.check for f in dataset.findings] == ["channel"]


def test_another_channel_never_takes_the_place_of_a_missing_one(nnunet, tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(nnunet / "imagesTr" / "case_2_0001.nii.gz", image, affine)
    (nnunet / "imagesTr" / "case_2_0000.nii.gz").unlink()
    _, dataset = opened(nnunet, "nnunet")
    assert [c.case_id for c in dataset.cases] == ["case_0", "case_1", "case_3"]
    assert [(f.case_id, f.message) for f in dataset.findings] == [("case_2", "no image of channel 0")]
    names = [raw.save(tmp_path / "list" / f"{name}.nii.gz", image, affine).name for name in ("a", "b", "alone")]
    raw.save(tmp_path / "list" / "v1_0001.nii.gz", image, affine)
    images = {"pair": names[:2], "few": names[2:], "none": [], "v1": "v1.nii.gz"}
    for name in images:
        raw.save(tmp_path / "list" / "labels" / f"{name}.nii.gz", label, affine)
    entries = [{"image": image, "label": f"labels/{name}.nii.gz"} for name, image in images.items()]
    (tmp_path / "list" / "list.json").write_text(json.dumps({"training": entries}))
    source, dataset = opened(tmp_path / "list", "datalist", channel=1)
    assert {c.case_id: c.images[0].name for c in dataset.cases} == {
        "pair": "b.nii.gz", "few": "alone.nii.gz", "v1": "v1_0001.nii.gz",
    }  # fmt: skip
    assert [f.case_id for f in dataset.findings] == ["none"]
    for case in dataset.cases:
        if case.case_id == "few":  # it might hold several channels
            with pytest.raises(RejectedError, match="channel 1 asked for, the file has one"):
                source.load(case)
        else:
            source.load(case)
    assert [c.case_id for c in opened(tmp_path / "list", "datalist", channel=2)[1].cases] == ["few"]


def test_msd_with_4d_images_and_junk(tmp_path, raw):
    image, label, affine = raw.make_volume()
    folder = tmp_path / "Task01_Toy"
    raw.save(folder / "imagesTr" / "a.nii.gz", np.stack([image, image + 7]), affine)
    raw.save(folder / "labelsTr" / "a.nii.gz", label, affine)
    description = {
        "name": "Toy",
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema", "2": "core"},
        "training": [
            {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
            {"image": "./imagesTr/._a.nii.gz", "label": "./labelsTr/._a.nii.gz"},
            {"image": "./imagesTr/gone.nii.gz", "label": "./labelsTr/gone.nii.gz"},
        ],
        "test": ["./imagesTs/b.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    source, dataset = opened(folder, "msd", channel=1)
    assert dataset.classes == [("edema", (1,)), ("core", (2,))]
    assert dataset.modality == "T1w"
    case = source.load(dataset.cases[0])
    np.testing.assert_array_equal(case.image_zyx, image + 7)
    assert [f.check for f in case.findings] == ["channel"]
    assert [(f.case_id, f.severity) for f in dataset.findings] == [("gone", "reject")]


def test_datalist_with_folds_and_equal_names(tmp_path, raw):
    image, label, affine = raw.make_volume()
    entries = []
    for number in range(3):
        raw.save(tmp_path / f"p{number}" / "image.nii.gz", image, affine)
        raw.save(tmp_path / f"p{number}" / "label.nii.gz", label, affine)
        entries.append({"image": f"p{number}/image.nii.gz", "label": f"p{number}/label.nii.gz", "fold": number})
    (tmp_path / "list.json").write_text(json.dumps({"training": entries, "testing": [{"image": "p0/image.nii.gz"}]}))
    _, dataset = opened(tmp_path, "datalist")
    assert [c.case_id for c in dataset.cases] == ["label", "p1_label", "p2_label"]
    assert dataset.splits == {"train": ["p1_label", "p2_label"], "val": ["label"], "test": []}
    assert opened(tmp_path / "list.json", "datalist")[1].cases == dataset.cases


def test_folders_of_mixed_formats(tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(tmp_path / "images" / "a.nii.gz", image, affine)
    raw.save(tmp_path / "labels" / "a.nii", label, affine)
    raw.save(tmp_path / "images" / "b.nii.gz", image, affine)
    _, dataset = opened(tmp_path, "folder")
    assert dataset.classes == [("label_1", (1,)), ("label_2", (2,))]
    assert {(f.check, f.severity) for f in dataset.findings} == {("labels", "warn"), ("missing pair", "reject")}
    (tmp_path / "labels.json").write_text(json.dumps({"1": "organ", "2": "tumour"}))
    assert opened(tmp_path, "folder")[1].classes == [("organ", (1,)), ("tumour", (2,))]


@pytest.mark.parametrize("overlap", ["regions", "priority"])
def test_one_file_per_class_keeps_overlaps_or_says_so(overlap, tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(tmp_path / "s1" / "ct.nii.gz", image, affine)
    raw.save(tmp_path / "s1" / "segmentations" / "organ.nii.gz", label > 0, affine, np.uint8)
    raw.save(tmp_path / "s1" / "segmentations" / "tumour.nii.gz", label == 2, affine, np.uint8)
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns1;50;test\n")
    source, dataset = opened(tmp_path, "classfiles", overlap=overlap)
    case = source.load(dataset.cases[0])
    values = dict(dataset.classes)
    np.testing.assert_array_equal(np.isin(case.label_zyx, values["tumour"]), label == 2)
    organ = label > 0 if overlap == "regions" else label == 1
    np.testing.assert_array_equal(np.isin(case.label_zyx, values["organ"]), organ)
    assert [(f.check, f.severity) for f in case.findings] == [("overlap", "note" if overlap == "regions" else "warn")]
    assert dataset.splits == {"train": [], "val": [], "test": ["s1"]}
    assert case.digest == source.fingerprint(dataset.cases[0])


def test_bids_tables_that_contradict_each_other(tmp_path, raw):
    """Every subject may have a table of its own; the first one must not speak for all."""
    image, label, affine = raw.make_volume()
    for subject, names in (("1", "index\tname\n1\tliver\n2\tspleen\n"), ("2", "index\tname\n1\tliver\n3\tspleen\n")):
        folder = tmp_path / f"sub-{subject}" / "anat"
        raw.save(folder / f"sub-{subject}_T1w.nii.gz", image, affine)
        raw.save(folder / f"sub-{subject}_dseg.nii.gz", label, affine)
        (folder / f"sub-{subject}_dseg.tsv").write_text(names)
    assert opened(tmp_path, "bids")[1].classes == [("liver", (1,)), ("spleen", (2, 3))]
    table = tmp_path / "sub-2" / "anat" / "sub-2_dseg.tsv"
    table.write_text("index\tname\n1\tspleen\n2\tliver\n")
    with pytest.raises(SourceError, match="value 1 is 'liver' in .*sub-1_dseg.tsv and 'spleen' in .*sub-2_dseg.tsv"):
        opened(tmp_path, "bids")
    assert len(opened(tmp_path, "bids", label_ids=[(1,)])[1].cases) == 2


def test_bids_derivatives(tmp_path, raw):
    image, label, affine = raw.make_volume()
    for sub in ("sub-01", "sub-02"):
        raw.save(tmp_path / sub / "anat" / f"{sub}_T1w.nii.gz", image, affine)
        raw.save(tmp_path / sub / "anat" / f"{sub}_T2w.nii.gz", image + 5, affine)
        raw.save(tmp_path / "derivatives" / "seg" / sub / "anat" / f"{sub}_space-orig_desc-x_dseg.nii.gz", label, affine)
    (tmp_path / "derivatives" / "seg" / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\torgan\n2\ttumour\n")
    source, dataset = opened(tmp_path / "derivatives" / "seg", "bids", modality="T2")
    assert dataset.classes == [("organ", (1,)), ("tumour", (2,))]
    assert len(dataset.cases) == 2
    np.testing.assert_array_equal(source.load(dataset.cases[0]).image_zyx, image + 5)
    unclear = SOURCES["bids"].open(tmp_path / "derivatives" / "seg", {})
    assert not unclear.cases
    assert {f.severity for f in unclear.findings} == {"reject"}


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        detect_layout(tmp_path / "nothing")
    with pytest.raises(SourceError, match="none of"):
        detect_layout(tmp_path)
    (tmp_path / "dataset.json").write_text("{not json")
    with pytest.raises(SourceError, match="not valid JSON"):
        detect_layout(tmp_path)


@pytest.mark.parametrize("labels", [None, [], {"a": "x"}, {"a": -1}, {"a": 70000}])
def test_wrong_label_declarations_are_named(labels, nnunet):
    description = json.loads((nnunet / "dataset.json").read_text())
    description["labels"] = labels
    (nnunet / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(SourceError, match=r"dataset\.json"):
        SOURCES["nnunet"].open(nnunet, {})


def test_patterns_pair_by_what_the_stars_stand_for(tmp_path, raw):
    image, label, affine = raw.make_volume()
    for name, volume in (("a/scan_1.nii.gz", image), ("a/scan_1_gt.nii.gz", label), ("b/c/scan_2.nii.gz", image)):
        raw.save(tmp_path / name, volume, affine)
    raw.save(tmp_path / "Patient_7" / "Patient_7.nii.gz", image, affine)
    raw.save(tmp_path / "Patient_7" / "GT.nii.gz", label, affine)
    open_ = SOURCES["pattern"].open
    dataset = open_(tmp_path, {"image_files": "**/scan_*.nii.gz", "label_files": "**/scan_*_gt.nii.gz"})
    assert [c.case_id for c in dataset.cases] == ["1"]
    assert [(f.case_id, f.severity) for f in dataset.findings] == [("2", "reject")]
    dataset = open_(tmp_path, {"image_files": "Patient_*/Patient_*.nii.gz", "label_files": "Patient_*/GT.nii.gz"})
    assert [c.case_id for c in dataset.cases] == ["7"]
    with pytest.raises(SourceError, match="relative"):
        open_(tmp_path, {"image_files": "../*.nii.gz", "label_files": "*.nii.gz"})


def test_labelled_frames_of_a_cine_are_cases(tmp_path, raw):
    image, label, affine = raw.make_volume()
    cine, frames = np.stack([image + t for t in range(5)]), np.zeros((5, *label.shape), np.uint8)
    frames[1], frames[3] = label, label // 2
    raw.save(tmp_path / "T" / "A" / "A_sa.nii.gz", cine, affine)
    raw.save(tmp_path / "T" / "A" / "A_sa_gt.nii.gz", frames, affine)
    raw.save(tmp_path / "B" / "B_sa.nii.gz", cine, affine)
    raw.save(tmp_path / "B" / "B_sa_gt.nii.gz", frames * 0, affine)
    options = {"image_files": "**/*_sa.nii.gz", "label_files": "**/*_sa_gt.nii.gz", "frames": "labelled"}
    dataset = SOURCES["pattern"].open(tmp_path, options)
    assert [c.case_id for c in dataset.cases] == ["A_0", "A_1"]
    assert dataset.patients == {"A_0": "A", "A_1": "A"}
    assert [(f.case_id, f.check) for f in dataset.findings] == [("B", "frames")]
    for ref, t in zip(dataset.cases, (1, 3), strict=True):
        case = SOURCES["pattern"].load(ref)
        np.testing.assert_array_equal(case.image_zyx, cine[t])
        np.testing.assert_array_equal(case.label_zyx, frames[t])
        assert case.digest == SOURCES["pattern"].fingerprint(ref)
        assert not case.findings
    digests = {SOURCES["pattern"].fingerprint(ref) for ref in dataset.cases}
    assert len(digests) == 2


def test_two_files_of_one_name_are_said(tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(tmp_path / "images" / "a.nii", image, affine)
    raw.save(tmp_path / "images" / "a_0000.nii.gz", image, affine)
    raw.save(tmp_path / "labels" / "a.nii.gz", label, affine)
    _, dataset = opened(tmp_path, "folder", labels=["x", "y"])
    assert [(f.check, f.severity, f.case_id) for f in dataset.findings] == [("name", "warn", "a")]
    assert len(dataset.cases) == 1


def test_nnunet_file_maps_have_splits(tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(tmp_path / "i.nii.gz", image, affine)
    raw.save(tmp_path / "l.nii.gz", label, affine)
    cases = {name: {"images": ["i.nii.gz"], "label": "l.nii.gz"} for name in "abc"}
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2}, "dataset": cases}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert opened(tmp_path, "nnunet")[1].splits is None
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["c"]}]))
    assert opened(tmp_path, "nnunet")[1].splits == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert opened(tmp_path, "nnunet", fold=1)[1].splits == {"train": ["b"], "val": ["c"], "test": ["a"]}


@pytest.mark.parametrize(
    ("folds", "text"),
    [
        ([{"train": [["case_0", "case_1"]], "val": []}], r"\['case_0', 'case_1'\] is not a case id"),
        ([{"train": [1], "val": []}], "1 is not a case id"),
        ([{"train": "case_0", "val": []}], "'case_0' is not a list"),
        ([], "no fold 0"),
        ({"train": [], "val": []}, "no fold 0"),
        ([["case_0"]], "no fold 0"),
    ],
)
def test_wrong_folds_are_named(folds, text, nnunet):
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(SourceError, match=rf"splits_final\.json: .*{text}"):
        SOURCES["nnunet"].open(nnunet, {})
