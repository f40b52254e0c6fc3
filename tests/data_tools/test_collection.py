"""Collection files: typing errors are named, recipes resolve, splits follow patients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.collection import collection_of_sources, read_collection_file
from hermes_dist.errors import ConfigError, SourceError, TaskError, UsageError

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
    ],
)
def test_mistakes_are_named(fields, error, text, nnunet, tmp_path):
    with pytest.raises(error, match=text):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet, **fields)]))


def test_mistakes_of_the_whole_file_are_named(nnunet, tmp_path):
    with pytest.raises(ConfigError, match="preprocessing"):
        read_collection_file(write(tmp_path, datasets=[entry(nnunet)], preprocessing={"spacing": 2}))
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve_against_files_of_that_shape(recipe, tmp_path, raw):
    data = json.loads(recipe.read_text())
    image, label, affine = raw.make_volume()
    for dataset in data["datasets"]:
        root = tmp_path / dataset["path"]
        if dataset["layout"] == "msd":
            raw.save(root / "a.nii.gz", image, affine)
            names = {"0": "background", **{str(v): n for n, v in zip(dataset["labels"], dataset["label_ids"], strict=True)}}
            rows = [{"image": "a.nii.gz", "label": "a.nii.gz"}]
            (root / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": names, "training": rows}))
            continue
        wanted = {"amos_ct": "0001", "amos_mr": "0507", "chaos_t1": "1_t1_in", "chaos_t2": "1_t2"}.get(dataset["name"], "1")
        for key, volume in (("image_files", image), ("label_files", label)):
            raw.save(root / dataset[key].replace("*", wanted), volume, affine)
    (tmp_path / recipe.name).write_text(recipe.read_text())
    collection = read_collection_file(tmp_path / recipe.name)
    assert all(len(d.cases) == 1 for d in collection.datasets)
    tasks = collection.task_table()
    assert tasks.n_tasks == {"hermes_upstream": 71, "hermes_downstream": 6}[recipe.stem]
    assert [d["name"] for d in data["datasets"]] == [d.name for d in collection.datasets]
