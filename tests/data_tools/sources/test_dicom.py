"""DICOM: series, structure sets and segmentation objects."""

from __future__ import annotations

import shutil

import highdicom as hd
import numpy as np
import pydicom
import pytest
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.uid import JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from data_tools.findings import RejectedError
from data_tools.sources import SOURCES
from data_tools.sources.contours import fill_even_odd
from data_tools.sources.series import holds_series, read_series
from tests.data_tools.dicom_files import compress, write_seg, write_series, write_structures


def toy(shape=(6, 20, 24)):
    rng = np.random.default_rng(0)
    return rng.integers(-1000, 500, shape).astype(np.int16)


def test_series_are_stacked_by_position_in_ras(tmp_path):
    volume = toy()
    write_series(tmp_path / "p1", volume)
    assert holds_series(tmp_path / "p1")
    read = read_series(tmp_path / "p1")
    np.testing.assert_array_equal(read.array, volume)
    assert read.grid.spacing_mm_zyx == pytest.approx((3.0, 0.8, 0.9))
    np.testing.assert_allclose(read.grid.affine[:3, 3], [20, 30, 10])
    np.testing.assert_allclose(np.diag(read.grid.affine)[:3], [-0.9, -0.8, 3.0])


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_compressed_slices_are_read(tmp_path, syntax):
    volume = toy()
    write_series(tmp_path / "p1", volume)
    for path in (tmp_path / "p1").iterdir():
        compress(path, syntax)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_series(tmp_path / "p1").array, volume)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless])
def test_damaged_compressed_pixels_are_rejected(tmp_path, syntax):
    write_series(tmp_path / "p1", toy())
    path = tmp_path / "p1" / "0000.dcm"
    compress(path, syntax)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes(200))
    with pytest.raises(RejectedError):
        read_series(tmp_path / "p1")


def test_a_slice_that_is_shifted_in_its_plane_is_rejected(tmp_path):
    write_series(tmp_path / "p1", toy(), order=1)
    path = tmp_path / "p1" / "0003.dcm"
    for shift_mm, stacked in ((0.2, True), (0.6, False)):
        data = pydicom.dcmread(path)
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y + shift_mm, z]
        data.save_as(path)
        if stacked:
            read_series(tmp_path / "p1")
        else:
            with pytest.raises(RejectedError, match="aside of the line"):
                read_series(tmp_path / "p1")


def test_a_missing_slice_is_rejected(tmp_path):
    write_series(tmp_path / "p1", toy())
    (tmp_path / "p1" / "0997.dcm").unlink()
    with pytest.raises(RejectedError, match="missing or there twice"):
        read_series(tmp_path / "p1")


def test_two_series_and_damaged_slices_are_rejected(tmp_path):
    write_series(tmp_path / "p1", toy())
    file = tmp_path / "p1" / "0000.dcm"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(RejectedError):
        read_series(tmp_path / "p1")
    write_series(tmp_path / "p2", toy())
    write_series(tmp_path / "p2", toy((3, 20, 24)), order=1, uid=generate_uid())
    with pytest.raises(RejectedError, match="2 image series"):
        read_series(tmp_path / "p2")


def test_polygons_fill_pixel_centres_and_keep_holes():
    parity = np.zeros((12, 12), np.int32)
    fill_even_odd(np.array([[1.5, 1.5], [8.5, 1.5], [8.5, 9.5], [1.5, 9.5]]), parity)
    fill_even_odd(np.array([[3.5, 3.5], [5.5, 3.5], [5.5, 5.5], [3.5, 5.5]]), parity)
    expected = np.zeros((12, 12), bool)
    expected[2:10, 2:9] = True
    expected[4:6, 4:6] = False
    np.testing.assert_array_equal(parity & 1, expected)


def test_a_circle_has_its_area():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    parity = np.zeros((200, 200), np.int32)
    fill_even_odd(np.stack([99.3 + 60 * np.cos(angle), 101.7 + 60 * np.sin(angle)], axis=1), parity)
    assert (parity & 1).sum() == pytest.approx(np.pi * 60**2, rel=0.005)


def test_structure_sets_have_the_stated_volumes(real_data):
    source = SOURCES["dicom"]
    dataset = source.open(real_data / "lung_tumour_ct", {"labels": ["GTV-1"], "label_ids": [1]})
    stated_ml = {"pat_1": 358.7, "pat_2": 6.4, "pat_3": 11.4}
    for ref in dataset.cases:
        case = source.load(ref)
        ml = (case.label_zyx == 1).sum() * np.prod(case.grid.spacing_mm_zyx) / 1000
        assert ml == pytest.approx(stated_ml[ref.case_id], rel=0.02)
        assert case.digest == source.fingerprint(ref)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", [SegmentationTypeValues.BINARY, SegmentationTypeValues.FRACTIONAL])
def test_segmentation_objects_land_on_their_voxels(kind, flip, tmp_path):
    volume = toy()
    slices = write_series(tmp_path / "p1", volume, orientation=(-1, 0, 0, 0, -1, 0) if flip else (1, 0, 0, 0, 1, 0))
    organ, tumour = np.zeros(volume.shape, bool), np.zeros(volume.shape, bool)
    organ[1:5, 4:12, 5:20] = True
    tumour[2:4, 6:8, 7:9] = True
    algorithm = hd.AlgorithmIdentificationSequence(name="x", version="1", family=codes.cid7162.ArtificialIntelligence)
    segments = [
        SegmentDescription(n, label, codes.SCT.Organ, codes.SCT.Organ, SegmentAlgorithmTypeValues.AUTOMATIC, algorithm)
        for n, label in ((1, "organ"), (2, "tumour"))
    ]
    seg = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=np.stack([organ, tumour], axis=-1).astype(np.uint8 if kind == SegmentationTypeValues.BINARY else np.float32),
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    )
    seg.save_as(tmp_path / "p1" / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "p1" / "seg.dcm").Modality == "SEG"
    source = SOURCES["dicom"]
    dataset = source.open(tmp_path, {})
    assert [c.case_id for c in dataset.cases] == ["p1"]
    case = source.load(dataset.cases[0])
    values = dict(dataset.classes)
    np.testing.assert_array_equal(np.isin(case.label_zyx, values["tumour"]), tumour)
    np.testing.assert_array_equal(np.isin(case.label_zyx, values["organ"]), organ)
    assert [f.check for f in case.findings] == ["overlap"]


def test_equal_folder_names_do_not_make_equal_cases(tmp_path):
    """Archives call the study folders of many patients alike."""
    for patient in ("P1", "P2"):
        study = tmp_path / patient / "study-1"
        sources = write_series(study / "CT", toy())
        source = [pydicom.dcmread(f) for f in sorted((study / "CT").iterdir())]
        (study / "RT").mkdir()
        description = SegmentDescription(1, "liver", codes.SCT.Organ, codes.SCT.Liver, SegmentAlgorithmTypeValues.MANUAL)
        mask = np.zeros((6, 20, 24), np.uint8)
        mask[2:4, 5:9, 6:12] = 1
        seg = hd.seg.Segmentation(
            source_images=sources, pixel_array=mask, segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=[description], series_instance_uid=generate_uid(), series_number=2,
            sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x", manufacturer_model_name="x",
            software_versions="1", device_serial_number="1",
        )  # fmt: skip
        seg.save_as(study / "RT" / "seg.dcm")
        assert source
    dataset = SOURCES["dicom"].open(tmp_path, {})
    assert [c.case_id for c in dataset.cases] == ["P1_study-1", "P2_study-1"]


def test_studies_of_one_patient_id_are_one_patient(tmp_path):
    def write(case, patient):
        write_series(tmp_path / "d" / case, toy())
        write_structures(tmp_path / "d" / case / "rt.dcm", [("gtv", [])])
        for path in (tmp_path / "d" / case).iterdir():
            data = pydicom.dcmread(path)
            data.PatientID = patient
            data.save_as(path)

    for case, patient in (("a1", "Doe "), ("a2", "Doe"), ("b", "Roe"), ("c", "")):
        write(case, patient)
    dataset = SOURCES["dicom"].open(tmp_path / "d", {})
    assert dataset.patients.keys() == {"a1", "a2", "b"}
    assert dataset.patients["a1"] == dataset.patients["a2"] != dataset.patients["b"]
    assert "Doe" not in str(dataset)
    assert not dataset.findings
    write("b", "Doe")
    dataset = SOURCES["dicom"].open(tmp_path / "d", {})
    assert not dataset.patients
    assert [(f.check, f.severity) for f in dataset.findings] == [("patients", "warn")]


@pytest.mark.parametrize(("drawn", "warned"), [((0, 2, 4, 5), False), ((0, 2), False), ((0, 2, 4, 6), True)])
def test_contours_on_every_second_slice_are_warned_of(drawn, warned, tmp_path):
    write_series(tmp_path / "p", toy((8, 20, 24)), spacing=(2.0, 1.0, 1.0))
    square = [[(-18 + x, -28 + y, 10 + 2 * k) for x, y in ((0, 0), (6, 0), (6, 6), (0, 6))] for k in drawn]
    write_structures(tmp_path / "p" / "rt.dcm", [("gtv", square)])
    case = SOURCES["dicom"].load(SOURCES["dicom"].open(tmp_path, {}).cases[0])
    assert set(np.flatnonzero(case.label_zyx.any(axis=(1, 2)))) == set(drawn)
    assert ["every 2. slice" in f.message for f in case.findings if f.check == "contour"] == [True] * warned


def test_objects_that_would_blow_up_are_refused(tmp_path):
    write_series(tmp_path / "p1", toy())
    file = tmp_path / "p1" / "0000.dcm"
    good = file.read_bytes()
    data = pydicom.dcmread(file)
    data.Rows = data.Columns = 65535
    data.save_as(file)
    with pytest.raises(RejectedError, match="cannot hold"):
        read_series(tmp_path / "p1")
    file.write_bytes(good.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1))
    with pytest.raises(RejectedError, match="deflated"):
        read_series(tmp_path / "p1")


def test_rescaled_series_keep_their_values(tmp_path):
    """PET states its own slope for each slice; CT that leaves 16 bits is kept whole."""
    volume = toy().clip(0)
    write_series(tmp_path / "pet", volume)
    for k, file in enumerate(sorted((tmp_path / "pet").iterdir(), key=lambda f: -int(f.stem) % 1000)):
        data = pydicom.dcmread(file)
        data.RescaleSlope, data.RescaleIntercept = 0.5 + k, 0
        data.save_as(file)
    read = read_series(tmp_path / "pet").array
    assert read.dtype == np.float32
    for k, plane in enumerate(read):
        np.testing.assert_allclose(plane, (volume[k] + 1024.0) * (0.5 + k))
    write_series(tmp_path / "ct", volume)
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        data.RescaleIntercept = 60000
        data.save_as(file)
    np.testing.assert_array_equal(read_series(tmp_path / "ct").array, volume.astype(np.int32) + 61024)


def square(x, y, side, z=19.0):
    """Corners between pixel centres of `write_series`: slice 3, pixels x … x + side."""
    corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    return [(-20 + 0.9 * (i - 0.5), -30 + 0.8 * (j - 0.5), z) for i, j in corners]


def test_structures_of_one_name_are_one_region(tmp_path):
    """Parts drawn as ROIs of one name: none replaces another, overlapping ones cut no holes, each keeps its own hole."""
    write_series(tmp_path / "p1", toy())
    rois = [
        ("node", [square(2, 2, 6), square(4, 4, 2)]),
        ("other", [square(0, 15, 2)]),
        ("node", [square(6, 6, 5)]),
        ("node", []),
    ]
    write_structures(tmp_path / "p1" / "rt.dcm", rois)
    source = SOURCES["dicom"]
    case = source.load(source.open(tmp_path, {"labels": ["node"], "label_ids": [1]}).cases[0])
    expected = np.zeros((6, 20, 24), bool)
    expected[3, 2:8, 2:8] = True
    expected[3, 4:6, 4:6] = False
    expected[3, 6:11, 6:11] = True
    np.testing.assert_array_equal(case.label_zyx, expected)
    assert not case.findings


def seg_case(folder, slices, seg_slices, mask, change=None):
    """The label of a series with a SEG that was made on `seg_slices`."""
    write_seg(folder / "seg.dcm", seg_slices, {"organ": mask})
    if change:
        data = pydicom.dcmread(folder / "seg.dcm")
        change(data)
        data.save_as(folder / "seg.dcm")
    source = SOURCES["dicom"]
    return source.load(source.open(folder.parent, {}).cases[0]).label_zyx > 0


def shared(data, **fields):
    measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    for name, value in fields.items():
        setattr(measures, name, value)


def shift(mm):
    def change(data):
        for group in data.PerFrameFunctionalGroupsSequence:
            position = group.PlanePositionSequence[0].ImagePositionPatient
            position[0] = float(position[0]) + mm

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (shift(0.4), "0.44 voxels off"),
        (lambda data: shared(data, PixelSpacing=[0.8, 0.91]), r"0\.\d+ voxels off"),
        (lambda data: shared(data, PixelSpacing=[1.6, 1.8]), "pixels of another size"),
    ],
)
def test_segmentations_beside_the_voxels_are_rejected(change, text, tmp_path):
    slices = write_series(tmp_path / "p1", toy())
    mask = np.zeros((6, 20, 24), bool)
    mask[2:4, 5:9, 6:12] = True
    with pytest.raises(RejectedError, match=text):
        seg_case(tmp_path / "p1", slices, slices, mask, change)
    np.testing.assert_array_equal(seg_case(tmp_path / "p1", slices, slices, mask, shift(0.01)), mask)


@pytest.mark.parametrize(
    ("change", "used"),
    [
        (None, [1, 2]),
        (lambda data: shared(data, SpacingBetweenSlices=5.0), [1]),
        (lambda data: shared(data, SliceThickness=2.5), [0, 1, 2, 3]),
    ],
)
def test_segmentations_of_thicker_slices_are_rejected(change, used, tmp_path):
    slices = write_series(tmp_path / "p1", toy((8, 20, 24)), spacing=(2.5, 0.8, 0.9))
    thick = write_series(tmp_path / "thick", toy((4, 20, 24)), spacing=(5.0, 0.8, 0.9))
    shutil.rmtree(tmp_path / "thick")
    for data in thick:
        data.StudyInstanceUID, data.FrameOfReferenceUID = slices[0].StudyInstanceUID, slices[0].FrameOfReferenceUID
    mask = np.zeros((4, 20, 24), bool)
    mask[used, 5:9, 6:12] = True
    with pytest.raises(RejectedError, match=r"expected the image's step of 2\.5 mm"):
        seg_case(tmp_path / "p1", slices, thick, mask, change)


@pytest.mark.parametrize("used", [[3], [1, 4], [0, 2, 5], [1, 2, 5]])
@pytest.mark.parametrize("thickness", [2.5, 5.0])
def test_segmentations_of_few_slices_are_read(used, thickness, tmp_path):
    """Frames without labels are left out by most writers; thick slices may overlap."""
    slices = write_series(tmp_path / "p1", toy(), spacing=(2.5, 0.8, 0.9))
    mask = np.zeros((6, 20, 24), bool)
    mask[used, 5:9, 6:12] = True
    label = seg_case(tmp_path / "p1", slices, slices, mask, lambda data: shared(data, SliceThickness=thickness))
    np.testing.assert_array_equal(label, mask)
