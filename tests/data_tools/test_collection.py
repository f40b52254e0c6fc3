"""Collection files: typing errors are named, recipes resolve, splits follow patients."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.collection import collection_of_sources, read_collection_file
from data_tools.convert import check
from data_tools.entries import DatasetEntry
from hermes_dist.errors import ConfigError, SourceError, TaskError, UsageError
from tests.data_tools.dicom_files import write_chaos

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "collections").glob("*.json"))


def write(folder, **fields):
    file = folder / "collection.json"
    file.write_text(json.dumps(fields))
    return file


def entry(folder, **fields):
    return {"name": "toy", "path": folder.name, "layout": "nnunet", **fields}


def test_labels_can_be_chosen_renamed_and_made_regions(nnunet, tmp_path):
    cases = [
        ({"labels": ["tumour"]}, [("tumour", (2,))]),
        ({"labels": ["liver", "lesion"], "label_ids": [[1, 2], 2]}, [("liver", (1, 2)), ("lesion", (2,))]),
        ({"labels": {"liver": [1, 2]}}, [("liver", (1, 2))]),
    ]
    for fields, expected in cases:
        dataset = read_collection_file(write(tmp_path, datasets=[entry(nnunet, **fields)])).datasets[0]
        assert dataset.classes == expected
        assert dataset.declared_values == {1, 2}


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"modalty": "CT"}, ConfigError, "Did you mean 'modality'"),
        ({"layout": "nnunt"}, ConfigError, "Did you mean 'nnunet'"),
        ({"labels": ["tumor"]}, ConfigError, "Did you mean 'tumour'"),
        ({"labels": ["a"], "label_ids": [1, 2]}, ConfigError, "one id each"),
        ({"path": "nowhere"}, SourceError, "does not exist"),
        ({"include": "nothing"}, SourceError, "no case found"),
        ({"channel": "x"}, ConfigError, "channel"),
        ({"channel": -1}, ConfigError, "channel"),
        ({"name": "../x"}, ConfigError, "name"),
        ({"name": "a\nb"}, ConfigError, "name"),
        ({"labels": []}, ConfigError, "at least 1"),
        ({"labels": ["a"], "label_ids": [0]}, ConfigError, "label_ids"),
        ({"labels": ["a"], "label_ids": [99999]}, ConfigError, "label_ids"),
        ({"ignore_value": 2}, ConfigError, "belongs to a class"),
        ({"parts": {"train": 0, "val": 0, "test": 3}}, ConfigError, "train"),
    ],
)
def test_mistakes_are_named(fields, error, text, nnunet, tmp_path):
    with pytest.raises(error, match=text):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet, **fields)]))


def test_mistakes_of_the_whole_file_are_named(nnunet, tmp_path):
    with pytest.raises(ConfigError, match="preprocessing"):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet)], preprocessing={"spacing": 2}))
    for wrong in (
        {"spacing_mm_zyx": [0, 1, 1]}, {"spacing_mm_zyx": [float("nan"), 1, 1]}, {"percentiles": [98, 2]},
        {"ct_clip_hu": [500, -990]}, {"body_margin_mm": float("inf")},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            read_collection_file(write(tmp_path, datasets=[entry(nnunet)], preprocessing=wrong))
    (tmp_path / "table.json").write_text('{"toy": ["case_0"]}')
    for key in ("splits", "patients"):
        with pytest.raises(ConfigError, match=r"table\.json: toy: expected an object"):
            read_collection_file(write(tmp_path, datasets=[entry(nnunet)], **{key: "table.json"}))
    file = write(tmp_path, datasets=[entry(nnunet)], splits={"toy": {"train": ["case_0"], "test": ["case_0"]}})
    with pytest.raises(ConfigError, match="twice"):
        read_collection_file(file)
    with pytest.raises(ConfigError, match="Did you mean 'toy'"):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet)], splits={"toys": {}}))
    with pytest.raises(TaskError, match="declared twice"):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet), entry(nnunet)])).task_table()


def test_other_peoples_remarks_are_left_alone(nnunet, tmp_path):
    file = write(tmp_path, datasets=[entry(nnunet, hospital_code="x", notes=["y"])], curator="z")
    assert len(read_collection_file(file).datasets[0].cases) == 4


def test_draws_follow_patients_and_are_stable(tmp_path, raw):
    a = raw.make_nnunet(tmp_path / "Dataset001_A", cases=12)
    b = raw.make_nnunet(tmp_path / "Dataset002_B", cases=12, seed=30)
    patients = {name: {f"case_{i}": f"p{i // 2}" for i in range(12)} for name in ("a", "b")}
    datasets = [{"name": n, "path": p.name} for n, p in (("a", a), ("b", b))]
    one = read_collection_file(write(tmp_path, datasets=datasets, patients=patients))
    two = read_collection_file(write(tmp_path, datasets=datasets[::-1], patients=patients))
    for dataset in one.datasets:
        other = next(d for d in two.datasets if d.name == dataset.name)
        assert dataset.split_of == other.split_of
        assert set(dataset.split_of.values()) == {"train", "val", "test"}
    parts = {}
    for dataset in one.datasets:
        for case_id, part in dataset.split_of.items():
            assert parts.setdefault(dataset.patient_of[case_id], part) == part


@pytest.mark.parametrize(
    ("cases", "expected"), [(1, {"train"}), (2, {"train", "test"}), (4, {"train", "test"}), (6, {"train", "val", "test"})]
)
def test_small_sets_have_no_validation_part(cases, expected, tmp_path, raw):
    collection = collection_of_sources([raw.make_nnunet(tmp_path / "Dataset001_A", cases=cases)])
    assert set(collection.datasets[0].split_of.values()) == expected


def test_sources_need_a_modality(tmp_path, raw):
    image, label, affine = raw.make_volume()
    raw.save(tmp_path / "d" / "images" / "a.nii.gz", image, affine)
    raw.save(tmp_path / "d" / "labels" / "a.nii.gz", label, affine)
    with pytest.raises(UsageError, match="--modality"):
        collection_of_sources([tmp_path / "d"])
    assert collection_of_sources([tmp_path / "d"], modality="CT").datasets[0].modality == "CT"


def write_as_downloaded(root, raw):
    """A few cases of each of the paper's datasets, named and laid out as they come."""
    image, label, affine = raw.make_volume()
    pairs = [
        ("LiTS/Training Batch 1/volume-0.nii", "LiTS/Training Batch 1/segmentation-0.nii"),
        ("KiTS19/case_00000/imaging.nii.gz", "KiTS19/case_00000/segmentation.nii.gz"),
        *((f"AMOS22/images{r}/amos_{i}.nii.gz", f"AMOS22/labels{r}/amos_{i}.nii.gz") for r, i in
          [("Tr", "0001"), ("Tr", "0507"), ("Va", "0018"), ("Va", "0540")]),
        ("AMOS22/imagesTs/amos_0002.nii.gz", None),
        ("BTCV/Training/img/img0001.nii.gz", "BTCV/Training/label/label0001.nii.gz"),
        ("StructSeg/Thoracic_OAR/1/data.nii.gz", "StructSeg/Thoracic_OAR/1/label.nii.gz"),
        ("StructSeg/HaN_OAR/1/data.nii.gz", "StructSeg/HaN_OAR/1/label.nii.gz"),
        ("DLBS_nifti/images/dlbs_1.nii.gz", "DLBS_nifti/labels/dlbs_1.nii.gz"),
        *((f"AutoPET/PETCT_ab/{s}/SUV.nii.gz", f"AutoPET/PETCT_ab/{s}/SEG.nii.gz") for s in ("s1", "s2")),
        ("SegTHOR/train/Patient_01/Patient_01.nii.gz", "SegTHOR/train/Patient_01/GT.nii.gz"),
        ("Task07_Pancreas/imagesTr/pancreas_001.nii.gz", "Task07_Pancreas/labelsTr/pancreas_001.nii.gz"),
    ]  # fmt: skip
    for image_file, label_file in pairs:
        raw.save(root / image_file, image, affine)
        if label_file:
            values = label // 2 if "AutoPET" in label_file else label * 7 if "0507" in label_file else label
            raw.save(root / label_file, values, affine, np.uint8)
    for folder in ("Training/Labeled/A1", "Validation/B2"):
        name = f"OpenDataset/{folder}/{folder[-2:]}_sa"
        raw.save(root / f"{name}.nii.gz", np.stack([image + t for t in range(4)]), affine)
        raw.save(root / f"{name}_gt.nii.gz", np.stack([label, label * 0, label, label * 0]), affine)
    write_chaos(root / "CHAOS" / "Train_Sets" / "MR")
    rows = [{"image": "./imagesTr/pancreas_001.nii.gz", "label": "./labelsTr/pancreas_001.nii.gz"}]
    names = {"0": "background", "1": "pancreas", "2": "cancer"}
    (root / "Task07_Pancreas" / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": names, "training": rows})
    )


EXPECTED = {
    "hermes_upstream": {
        "lits": ["0"],
        "kits": ["00000"],
        "amos_ct": ["Tr_0001", "Va_0018"],
        "amos_mr": ["Tr_0507", "Va_0540"],
        "bcv": ["0001"],
        "structseg_oar": ["1"],
        "chaos_t1": ["1_T1DUAL_InPhase", "1_T1DUAL_OutPhase"],
        "chaos_t2": ["1_T2SPIR"],
        "structseg_head_oar": ["1"],
        "mnm": ["A1_0", "A1_1", "B2_0", "B2_1"],
        "brain_structure": ["dlbs_1"],
        "autopet": ["ab_s1", "ab_s2"],
    },
    "hermes_downstream": {"msd_pancreas": ["pancreas_001"], "segthor": ["01"]},
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_read_the_papers_datasets_as_they_come(recipe, tmp_path, raw):
    write_as_downloaded(tmp_path, raw)
    (tmp_path / recipe.name).write_text(recipe.read_text())
    collection = read_collection_file(tmp_path / recipe.name)
    assert {d.name: [c.case_id for c in d.cases] for d in collection.datasets} == EXPECTED[recipe.stem]
    assert not [f for d in collection.datasets for f in d.findings if f.severity == "reject"]
    assert collection.task_table().n_tasks == {"hermes_upstream": 71, "hermes_downstream": 6}[recipe.stem]
    part = {(d.name, case_id): p for d in collection.datasets for case_id, p in d.split_of.items()}
    if recipe.stem == "hermes_upstream":
        assert {part["amos_ct", "Va_0018"], part["amos_mr", "Va_0540"], part["mnm", "B2_0"], part["mnm", "B2_1"]} == {"test"}
        assert part["amos_ct", "Tr_0001"] == part["amos_mr", "Tr_0507"] == part["mnm", "A1_0"] == "train"
        assert len({part["autopet", "ab_s1"], part["autopet", "ab_s2"]}) == 1
        assert len({part["chaos_t1", "1_T1DUAL_InPhase"], part["chaos_t2", "1_T2SPIR"]}) == 1
    assert check(collection).counts == {"checked": sum(len(d.cases) for d in collection.datasets)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_say_what_is_not_certain(recipe):
    """Class names come from the paper's supplement at best: every entry but one that was read in code is marked."""
    for dataset in json.loads(recipe.read_text())["datasets"]:
        DatasetEntry.model_validate(dataset)
        assert len(dataset["labels"]) == len(dataset["label_ids"])
        assert dataset["unverified"] or dataset["name"] == "brain_structure"


def test_parts_and_held_out_releases(tmp_path, raw):
    root = raw.make_nnunet(tmp_path / "Dataset001_A", cases=20)
    fields = {"parts": {"train": 12, "val": 3, "test": 5}}
    dataset = read_collection_file(write(tmp_path, datasets=[entry(root, **fields)])).datasets[0]
    assert Counter(dataset.split_of.values()) == fields["parts"]
    fields["held_out"] = "case_1[0-9]_"  # ten of the twenty
    dataset = read_collection_file(write(tmp_path, datasets=[entry(root, **fields)])).datasets[0]
    assert {i for i, p in dataset.split_of.items() if p == "test"} == {f"case_{i}" for i in range(10, 20)}
    assert Counter(dataset.split_of.values()) == {"train": 8, "val": 2, "test": 10}
    for key, text in (("patient", "needs a group"), ("held_out", "not a regular expression")):
        with pytest.raises(ConfigError, match=text):
            read_collection_file(write(tmp_path, datasets=[entry(root, **{key: "(" if key == "held_out" else "x"})]))


def test_a_release_for_testing_is_never_drawn_into_training(tmp_path, raw):
    root = raw.make_nnunet(tmp_path / "Dataset001_A", cases=8)
    for i in range(4):
        image, label, affine = raw.make_volume(i)
        raw.save(root / "imagesTs" / f"test_{i}_0000.nii.gz", image, affine)
        raw.save(root / "labelsTs" / f"test_{i}.nii.gz", label, affine)
    official = {f"test_{i}" for i in range(4)}
    dataset = collection_of_sources([root]).datasets[0]
    assert {i for i, p in dataset.split_of.items() if p == "test"} == official
    assert Counter(dataset.split_of.values()) == {"train": 7, "val": 1, "test": 4}
    fields = {"held_out": "case_[01]_"}
    known = {("toy", i): "train" for i in [*official, *(f"case_{i}" for i in range(8))]}  # of a store that was made before
    dataset = read_collection_file(write(tmp_path, datasets=[entry(root, **fields)]), known).datasets[0]
    assert {i for i, p in dataset.split_of.items() if p == "test"} == {"case_0", "case_1"}
    patients = {"toy": {"case_1": "anna", "case_5": "anna"}}
    dataset = read_collection_file(write(tmp_path, datasets=[entry(root, **fields)], patients=patients)).datasets[0]
    assert {dataset.split_of[i] for i in ("case_0", "case_1", "case_5")} == {"test"}
    dataset = read_collection_file(write(tmp_path, datasets=[entry(root, parts={"train": 9, "val": 3}, include="case_")]))
    assert set(dataset.datasets[0].split_of.values()) == {"train", "val"}


def test_what_may_divide_a_patient_is_warned_of(nnunet, tmp_path):
    def messages(known=None, splits=None, patients=None, **fields):
        file = write(tmp_path, datasets=[entry(nnunet, **fields)], splits=splits, patients=patients)
        dataset = read_collection_file(file, known).datasets[0]
        assert {f.severity for f in dataset.findings} <= {"warn"}
        return [f.message for f in dataset.findings]

    assert messages(patient=r"_(\d)") == messages(patients={"toy": {"case_0": "anna"}}) == []
    (found,) = messages(patients={"toy": {"case_0.nii.gz": "anna"}})
    assert found == "1 cases of `patients` are not there, e.g. case_0.nii.gz"
    assert messages(patients={"toy": {"case_0": "anna"}}, include="case_[12]") == []
    (found,) = messages(patient="^(P[0-9]+)", patients={"toy": {"case_0": "anna"}})
    assert "fits 3 case ids not, e.g. case_1" in found
    (found,) = messages(held_out="release2")
    assert "fits no image path" in found
    anna = {"toy": {"case_0": "anna", "case_3": "anna"}}
    splits = {"toy": {"train": ["case_0", "case_1"], "test": ["case_2", "case_3"]}}
    (found,) = messages(splits=splits, patients=anna)
    assert "'anna' in train (toy/case_0) and test (toy/case_3)" in found
    (found,) = messages({("toy", "case_0"): "train", ("toy", "case_3"): "test"}, patients=anna)
    assert found.startswith("1 patients are in more than one part")
    assert messages(splits=splits, patients={"toy": {"case_0": "anna", "case_1": "anna"}}) == []


def test_names_that_are_no_text_are_left_out(tmp_path, raw):
    root = raw.make_nnunet(tmp_path / "Dataset001_A", cases=2)
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        good = root / folder / f"case_0{suffix}.nii.gz"
        for name in (b"odd\xff", b"line\nbreak"):
            shutil.copy(good, os.fsencode(root / folder) + b"/" + name + suffix.encode() + b".nii.gz")
    dataset = collection_of_sources([root]).datasets[0]
    assert [c.case_id for c in dataset.cases] == ["case_0", "case_1"]
    found = [f for f in dataset.findings if f.check == "name"]
    assert {f.case_id for f in found} == {"odd\\udcff", "line\\nbreak"}
    assert all(f.severity == "reject" and json.dumps(f.to_json()).encode() and str(f).encode() for f in found)
