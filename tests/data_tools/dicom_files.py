"""DICOM series written on the spot."""

from __future__ import annotations

import gdcm
import highdicom as hd
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid


def write_series(folder, volume, spacing=(3.0, 0.8, 0.9), orientation=(1, 0, 0, 0, 1, 0), uid=None, order=-1, modality="CT"):
    """Slices along the normal; file names run against z unless `order` is 1."""
    uid = uid or generate_uid()
    study, frame = generate_uid(), generate_uid()
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    folder.mkdir(parents=True, exist_ok=True)
    slices = []
    for k, plane in enumerate(volume):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, study, frame
        data.Modality, data.PatientID, data.PatientName, data.InstanceNumber = modality, "p", "P^Q", k + 1
        data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = data.AccessionNumber = data.StudyID = ""
        data.Rows, data.Columns = plane.shape
        data.ImagePositionPatient = [float(v) for v in np.array([-20.0, -30.0, 10.0]) + normal * spacing[0] * k]
        data.ImageOrientationPatient, data.PixelSpacing = list(orientation), [spacing[1], spacing[2]]
        data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = spacing[0], 1, -1024
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.SamplesPerPixel, data.PhotometricInterpretation = 15, 0, 1, "MONOCHROME2"
        data.PixelData = (plane + 1024).astype("<u2").tobytes()
        data.save_as(folder / f"{(k * order) % 1000:04d}.dcm", enforce_file_format=True)
        slices.append(data)
    return slices


def compress(path, transfer_syntax):
    """Rewrite a file with its pixels in another transfer syntax."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(transfer_syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def write_chaos(root, seed=0):
    """One patient as CHAOS ships it, two phases of T1 with one set of masks, and T2; returns {case id: (image, label)}."""
    rng = np.random.default_rng(seed)
    cases = {}
    for sequence, phases in (("T1DUAL", ["InPhase", "OutPhase"]), ("T2SPIR", [""])):
        label = rng.choice(np.array([0, 63, 126, 189, 252], np.uint8), (5, 12, 14))
        for phase in phases:
            image = rng.integers(0, 900, label.shape).astype(np.int16)
            write_series(root / "1" / sequence / "DICOM_anon" / phase, image, modality="MR")
            cases["_".join(p for p in ("1", sequence, phase) if p)] = (image, label)
        ground = root / "1" / sequence / "Ground"
        ground.mkdir(parents=True)
        for name, plane in zip(sorted(f"{(-k) % 1000:04d}.png" for k in range(len(label))), range(len(label)), strict=True):
            order = sorted(range(len(label)), key=lambda k: f"{(-k) % 1000:04d}")
            Image.fromarray(label[order[plane]]).save(ground / name)
    return cases


def write_seg(path, slices, masks):
    """A binary DICOM-SEG of {label: mask} on the slices of `write_series`; returns the object."""
    manual = SegmentAlgorithmTypeValues.MANUAL
    seg = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=np.stack(list(masks.values()), axis=-1).astype(np.uint8),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[
            SegmentDescription(n, label, codes.SCT.Organ, codes.SCT.Organ, manual) for n, label in enumerate(masks, 1)
        ],
        series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(), instance_number=1,
        manufacturer="m", manufacturer_model_name="m", software_versions="1", device_serial_number="1",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return seg


def write_structures(path, rois):
    """An RTSTRUCT of (ROI name, contours); a contour is a list of LPS points."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = RTStructureSetStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.SeriesInstanceUID, data.PatientID = "RTSTRUCT", generate_uid(), "p"
    names, shapes = [], []
    for number, (name, contours) in enumerate(rois, 1):
        roi, shape, sequence = Dataset(), Dataset(), []
        roi.ROINumber, roi.ROIName, shape.ReferencedROINumber = number, name, number
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [float(v) for point in points for v in point]
            sequence.append(contour)
        shape.ContourSequence = Sequence(sequence)
        names.append(roi)
        shapes.append(shape)
    data.StructureSetROISequence, data.ROIContourSequence = Sequence(names), Sequence(shapes)
    data.save_as(path, enforce_file_format=True)
