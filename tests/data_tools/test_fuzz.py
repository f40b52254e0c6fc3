"""Whatever the bytes of a dataset, checking it ends with findings or an error that names what is wrong: no traceback, no hang."""

from __future__ import annotations

import json
import shutil
import warnings

import highdicom as hd
import numpy as np
import pytest
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, generate_uid

from data_tools.collection import collection_of_sources
from data_tools.convert import check
from hermes_dist.errors import HermesError
from tests.data_tools.dicom_files import compress, write_chaos, write_series


def nnunet(root, raw):
    raw.make_nnunet(root, cases=2)
    (root / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
    return ["dataset.json", "splits_final.json", "imagesTr/case_0_0000.nii.gz", "labelsTr/case_1.nii.gz"]


def msd(root, raw):
    image, label, affine = raw.make_volume()
    raw.save(root / "a.nii.gz", image, affine)
    raw.save(root / "b.nii.gz", label, affine)
    names = {"0": "background", "1": "organ", "2": "tumour"}
    rows = [{"image": "./a.nii.gz", "label": "./b.nii.gz", "fold": 0}]
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": names, "training": rows}))
    return ["dataset.json"]


def datalist(root, raw):
    msd(root, raw)
    (root / "dataset.json").rename(root / "list.json")
    return ["list.json"]


def bids(root, raw):
    image, label, affine = raw.make_volume()
    raw.save(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz", image, affine)
    raw.save(root / "sub-1" / "anat" / "sub-1_dseg.nii.gz", label, affine)
    (root / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\torgan\n2\ttumour\n")
    return ["dseg.tsv"]


def folder(root, raw):
    image, label, affine = raw.make_volume()
    raw.save(root / "images" / "a.nii", image, affine)
    raw.save(root / "labels" / "a.nii", label, affine)
    (root / "labels.json").write_text(json.dumps({"1": "organ", "2": "tumour"}))
    return ["labels.json", "images/a.nii", "labels/a.nii"]


def classfiles(root, raw):
    image, label, affine = raw.make_volume()
    raw.save(root / "s1" / "ct.nii.gz", image, affine)
    raw.save(root / "s1" / "segmentations" / "organ.nii.gz", label > 0, affine, np.uint8)
    (root / "meta.csv").write_text("image_id;split\ns1;train\n")
    return ["meta.csv", "s1/segmentations/organ.nii.gz"]


def dicom(root, raw):
    volume = np.random.default_rng(0).integers(-500, 500, (4, 10, 12)).astype(np.int16)
    sources = write_series(root / "p1", volume)
    description = SegmentDescription(1, "liver", codes.SCT.Organ, codes.SCT.Liver, SegmentAlgorithmTypeValues.MANUAL)
    seg = hd.seg.Segmentation(
        source_images=sources, pixel_array=(volume > 0).astype(np.uint8), segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[description], series_instance_uid=generate_uid(), series_number=2,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x", manufacturer_model_name="x",
        software_versions="1", device_serial_number="1",
    )  # fmt: skip
    seg.save_as(root / "p1" / "seg.dcm")
    for name, syntax in (("0999.dcm", JPEGLosslessSV1), ("0998.dcm", JPEG2000Lossless)):
        compress(root / "p1" / name, syntax)
    return ["p1/seg.dcm", "p1/0000.dcm", "p1/0999.dcm", "p1/0998.dcm"]


def chaos(root, raw):
    write_chaos(root)
    return ["1/T2SPIR/Ground/0000.png", "1/T2SPIR/DICOM_anon/0000.dcm"]


LAYOUTS = {f.__name__: f for f in (nnunet, msd, datalist, bids, folder, classfiles, dicom, chaos)}


def mutate(data, rng):
    """Some bytes changed, a piece lost or doubled, or (text) a number or word replaced by an odd one."""
    data = bytearray(data)
    kind = rng.integers(0, 4)
    a, b = sorted(rng.integers(0, len(data) + 1, 2))
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
    elif kind == 1:
        del data[a : min(b, a + 40)]
    elif kind == 2:
        data[a:a] = data[a : min(b, a + 40)]
    else:
        odd = [
            b"null",
            b"[]",
            b"{}",
            b"-1",
            b"1e999",
            b'"\\u0000"',
            b'"../../x"',
            b"99999999999999999999",
            b"\xff\xfe",
            b'""',
            b"true",
        ]
        data[a : a + int(rng.integers(0, 6))] = odd[rng.integers(0, len(odd))]
    return bytes(data)


def check_mutants(layout, count, tmp_path, raw):
    root = tmp_path / "Dataset001_Toy"
    root.mkdir()
    targets = LAYOUTS[layout](root, raw)
    keep = tmp_path / "keep"
    shutil.copytree(root, keep)
    rng = np.random.default_rng(list(layout.encode()))
    refused = found = 0
    for number in range(count):
        target = targets[number % len(targets)]
        (root / target).write_bytes(mutate((keep / target).read_bytes(), rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom warns of what it then reads
                report = check(collection_of_sources([root], layout=layout, modality="CT"))
            found += bool(report.rejected)
            assert not [f for f in report.findings if f.check == "unexpected"], (target, report.findings)
        except HermesError:
            refused += 1
        shutil.copy(keep / target, root / target)
    return refused + found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated_datasets_give_findings_or_a_named_error(layout, tmp_path, raw):
    assert check_mutants(layout, 24, tmp_path, raw) > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_thousand_mutated_datasets(layout, tmp_path, raw):
    """250 mutants per layout, 2,000 in all."""
    assert check_mutants(layout, 250, tmp_path, raw) > 10
