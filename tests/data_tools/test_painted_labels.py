"""Layouts of one mask a class: what the collection states is what is painted, checked and trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_tools.collection import read_collection_file
from data_tools.convert import check
from data_tools.sources import SOURCES
from hermes_dist.errors import ConfigError, SourceError
from tests.data_tools.dicom_files import write_seg, write_series

NAMES = ("kidney", "liver", "spleen")


def masks_of(count=3, overlap=True, shape=(6, 20, 24)):
    """Blocks side by side along x; each reaches a voxel into the next one."""
    masks = {}
    for number in range(count):
        mask = np.zeros(shape, bool)
        mask[1:5, 4:12, 2 * number : 2 * number + (3 if overlap else 2)] = True
        masks[NAMES[number] if number < len(NAMES) else f"organ_{number}"] = mask
    return masks


def write_classfiles(root, masks, raw):
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    shape = next(iter(masks.values())).shape
    raw.save(root / "s1" / "ct.nii.gz", np.random.default_rng(0).integers(-900, 400, shape).astype(np.int16), affine)
    for name, mask in masks.items():
        raw.save(root / "s1" / "segmentations" / f"{name}.nii.gz", mask, affine, np.uint8)


def write_dicom(root, masks, raw):
    shape = next(iter(masks.values())).shape
    slices = write_series(root / "s1", np.random.default_rng(0).integers(-900, 400, shape).astype(np.int16))
    write_seg(root / "s1" / "seg.dcm", slices, masks)


WRITERS = {"classfiles": write_classfiles, "dicom": write_dicom}


def resolve(tmp_path, layout, **fields):
    file = tmp_path / "collection.json"
    file.write_text(json.dumps({"datasets": [{"name": "a", "path": "data", "layout": layout, "modality": "CT", **fields}]}))
    return read_collection_file(file)


def resolved(tmp_path, layout, **fields):
    dataset = resolve(tmp_path, layout, **fields).datasets[0]
    return dataset, SOURCES[layout].load(dataset.cases[0]).label_zyx


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"labels": {"liver": 1, "spleen": 2, "kidney": 3}},
        {"labels": {"background": 0, "liver": 1, "spleen": [2], "kidney": 300}},
        {"labels": ["spleen", "kidney", "liver"], "label_ids": [7, 3, 1]},
    ],
)
def test_stated_values_are_painted(layout, fields, tmp_path, raw):
    masks = masks_of(overlap=False)
    WRITERS[layout](tmp_path / "data", masks, raw)
    dataset, label = resolved(tmp_path, layout, **fields)
    stated = dict(zip(fields["labels"], fields.get("label_ids") or fields["labels"].values(), strict=True))
    values = {n: v[0] if isinstance(v, list) else v for n, v in stated.items() if n != "background"}
    assert dict(dataset.classes) == {n: (v,) for n, v in values.items()}
    assert dataset.declared_values == set(values.values())
    for name, value in values.items():
        np.testing.assert_array_equal(label == value, masks[name])
    assert not check(resolve(tmp_path, layout, **fields)).rejected


@pytest.mark.parametrize("layout", WRITERS)
def test_of_overlapping_names_with_values_the_later_one_wins(layout, tmp_path, raw):
    masks = masks_of()
    WRITERS[layout](tmp_path / "data", masks, raw)
    _, label = resolved(tmp_path, layout, labels={"spleen": 5, "liver": 2, "kidney": 9})
    expected = np.zeros(label.shape, int)
    for name, value in (("spleen", 5), ("liver", 2), ("kidney", 9)):
        expected[masks[name]] = value
    np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("layout", WRITERS)
def test_names_alone_keep_their_overlaps(layout, tmp_path, raw):
    masks = masks_of()
    WRITERS[layout](tmp_path / "data", masks, raw)
    for fields in ({}, {"labels": ["spleen", "kidney"]}):
        dataset, label = resolved(tmp_path, layout, **fields)
        assert dataset.class_names == fields.get("labels", sorted(masks))
        for name, values in dataset.classes:
            np.testing.assert_array_equal(np.isin(label, values), masks[name])


@pytest.mark.parametrize("layout", WRITERS)
def test_values_hold_for_more_than_eight_names(layout, tmp_path, raw):
    masks = masks_of(count=10, overlap=False)
    WRITERS[layout](tmp_path / "data", masks, raw)
    stated = {name: 10 * n for n, name in enumerate(sorted(masks), 2)}
    dataset, label = resolved(tmp_path, layout, labels=stated)
    assert dataset.declared_values == set(stated.values())
    for name, value in stated.items():
        np.testing.assert_array_equal(label == value, masks[name])
    with pytest.raises(SourceError, match="at most 8"):
        resolve(tmp_path, layout, overlap="regions")


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"labels": {"liver": [1, 2], "spleen": 2}}, r"data: label 'liver' has the values \[1, 2\].*State one"),
        ({"labels": {"liver": 1, "spleen": 1}}, "'liver' and 'spleen' both have the value 1"),
        ({"labels": {"liver": 1, "spleen": 2}, "overlap": "regions"}, "values cannot be stated; remove"),
        ({"labels": ["liver", "spleen"], "label_ids": [1]}, "one id each"),
        ({"labels": ["liver", "liver"], "label_ids": [1, 2]}, "named twice"),
        ({"labels": {"liver": 1}, "label_ids": [1]}, "remove `label_ids`"),
        ({"labels": {"background": 0}}, "only the background"),
    ],
)
def test_values_that_cannot_be_painted_are_refused(layout, fields, text, tmp_path, raw):
    WRITERS[layout](tmp_path / "data", masks_of(), raw)
    with pytest.raises(ConfigError, match=text):
        resolve(tmp_path, layout, **fields)
