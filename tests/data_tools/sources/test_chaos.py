"""CHAOS: DICOM slices with one PNG a slice, paired by the order of their names, whatever order the slices lie in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_tools.collection import detect_layout
from data_tools.findings import RejectedError
from data_tools.sources import SOURCES
from tests.data_tools.dicom_files import write_chaos, write_series


@pytest.fixture
def chaos(tmp_path):
    expected = write_chaos(tmp_path / "MR")
    assert detect_layout(tmp_path / "MR") == "chaos"
    return tmp_path / "MR", expected


def test_masks_follow_their_slices(chaos):
    root, expected = chaos
    dataset = SOURCES["chaos"].open(root, {})
    assert {c.case_id for c in dataset.cases} == expected.keys() == {"1_T1DUAL_InPhase", "1_T1DUAL_OutPhase", "1_T2SPIR"}
    assert set(dataset.patients.values()) == {"1"}
    for ref in dataset.cases:
        case = SOURCES["chaos"].load(ref)
        image, label = expected[ref.case_id]
        np.testing.assert_array_equal(case.image_zyx, image)
        np.testing.assert_array_equal(case.label_zyx, label)
        assert case.digest == SOURCES["chaos"].fingerprint(ref)


def test_numbers_in_names_count_by_their_value(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 900, (11, 6, 7)).astype(np.int16)
    label = rng.choice(np.array([0, 63], np.uint8), image.shape)
    folder = tmp_path / "MR" / "1" / "T2SPIR"
    write_series(folder / "DICOM_anon", image, modality="MR", order=1)
    (folder / "Ground").mkdir()
    for k, plane in enumerate(label):  # slices have leading zeros, masks have none
        Image.fromarray(plane).save(folder / "Ground" / f"mask{k + 1}.png")
    (ref,) = SOURCES["chaos"].open(tmp_path / "MR", {}).cases
    np.testing.assert_array_equal(SOURCES["chaos"].load(ref).label_zyx, label)


def test_a_lost_mask_is_a_missing_pair(chaos):
    root, _ = chaos
    next((root / "1" / "T2SPIR" / "Ground").iterdir()).unlink()
    dataset = SOURCES["chaos"].open(root, {})
    assert [(f.case_id, f.check, f.severity) for f in dataset.findings] == [("1_T2SPIR", "missing pair", "reject")]
    assert len(dataset.cases) == 2


@pytest.mark.parametrize("damage", ["cut", "size", "colour", "text"])
def test_a_bad_mask_is_rejected(damage, chaos):
    root, _ = chaos
    mask = sorted((root / "1" / "T2SPIR" / "Ground").iterdir())[1]
    if damage == "cut":
        mask.write_bytes(mask.read_bytes()[:-30])
    elif damage == "text":
        mask.write_bytes(b"<html>")
    else:
        picture = Image.new("L", (5000, 5000)) if damage == "size" else Image.new("RGB", (14, 12))
        picture.save(mask)
    (ref,) = [c for c in SOURCES["chaos"].open(root, {}).cases if c.case_id == "1_T2SPIR"]
    with pytest.raises(RejectedError) as caught:
        SOURCES["chaos"].load(ref)
    assert caught.value.finding.file == str(mask)
