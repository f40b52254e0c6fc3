"""DICOM: one folder a case with an image series and an RTSTRUCT or a DICOM-SEG object. How slices become a volume: `series`."""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from data_tools.findings import Finding, RejectedError
from data_tools.sources.chaos import has_masks
from data_tools.sources.contours import roi_masks
from data_tools.sources.dicom_seg import segment_masks
from data_tools.sources.raw import CaseRef, RawCase, RawDataset, case_digest
from data_tools.sources.series import IMAGE_MODALITIES, files_in, is_dicom, read_dataset, read_header, stack
from data_tools.sources.volumes import Paint, merge_masks, overlap_finding, paint_of

LABEL_MODALITIES = frozenset({"RTSTRUCT", "SEG"})
MODALITY_NAMES = {"PT": "PET"}
PROBE_FILES = 20


class DicomSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """Any of the first files carries the DICM mark, and the masks are not PNGs."""
        return path.is_dir() and not has_masks(path) and any(is_dicom(f) for f in _some_files(path))

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """One case per folder that directly holds DICOM files. Only headers are read; classes are the ROI or segment names.

        What they paint: `paint_of`.
        """
        dataset = RawDataset(path.name, "dicom", path, [], [])
        folders = [f for f in (path, *sorted(p for p in path.rglob("*") if p.is_dir())) if any(is_dicom(x) for x in files_in(f))]
        series = [_Series.read(folder) for folder in folders]
        groups: dict[Path, list[_Series]] = {}
        for item in series:  # image and label object may lie in sibling folders of one patient
            complete = item.images and item.labels
            groups.setdefault(item.folder if complete or item.folder.parent == path else item.folder.parent, []).append(item)
        found = sorted({name for item in series for name in item.names})
        names = [str(n) for n in options.get("labels") or found]
        paint = paint_of(names, options, path)
        dataset.classes, dataset.painted = paint.classes, True
        shared = Counter(folder.name for folder in groups)
        people: dict[str, set[str]] = {}
        for folder, items in sorted(groups.items()):
            inside = folder.relative_to(path).parts or (path.name,)
            case_id = inside[-1] if shared[folder.name] == 1 else "_".join(inside)
            people[case_id] = {p for item in items for p in item.patients}
            _add_case(dataset, case_id, folder, items, paint)
        _add_patients(dataset, people)
        modalities = {item.modality for item in series if item.modality}
        if len(modalities) == 1:
            modality = modalities.pop()
            dataset.modality = MODALITY_NAMES.get(modality, modality)
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        findings: list[Finding] = []
        digests: list[str] = []
        slices = [read_dataset(path, digests) for path in case.images]
        image, grid = stack(slices, str(case.images[0].parent))
        values: dict[str, int] = dict(dict(case.options)["names"])
        regions = bool(dict(case.options)["regions"])
        found: set[str] = set()
        objects = [(read_dataset(path, digests), str(path)) for path, _ in case.labels]
        order = {name: place for place, name in enumerate(values)}

        def masks() -> Iterator[tuple[np.ndarray, int]]:
            """One mask a name, in the order of the names: where a voxel has one value, the later name wins."""
            streams = [
                (roi_masks if data.Modality == "RTSTRUCT" else segment_masks)(data, grid, list(values), file, findings)
                for data, file in objects
            ]
            merged = heapq.merge(*streams, key=lambda item: order[item[0]])
            for name, parts in itertools.groupby(merged, key=lambda item: item[0]):
                found.add(name)
                yield functools.reduce(np.logical_or, (mask for _, mask in parts)), values[name]

        label, overlap = merge_masks(masks(), grid.shape_vox_zyx, regions=regions)
        findings += overlap_finding(overlap, str(case.labels[0][0]), regions=regions)
        if missing := sorted(set(values) - found):
            message = f"no contours or segment named {', '.join(missing)}: taken as absent"
            findings.append(Finding("labels", "warn", message, "check the names", str(case.labels[0][0])))
        digest = case_digest(digests, case)
        return RawCase(image, grid, label, grid, digest, findings)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return case_digest([_read_only(path) for path in case.files], case)


@dataclass
class _Series:
    """What the headers of one folder say."""

    folder: Path
    images: dict[str, list[Path]]
    labels: list[Path]
    names: list[str]
    referenced: set[str]
    modality: str | None
    patients: set[str]

    @staticmethod
    def read(folder: Path) -> _Series:
        item = _Series(folder, {}, [], [], set(), None, set())
        for file in files_in(folder):
            if not is_dicom(file):
                continue
            try:
                header = read_header(file)
                modality, uid = str(header.get("Modality", "")), str(header.get("SeriesInstanceUID", ""))
                if modality in IMAGE_MODALITIES | LABEL_MODALITIES:
                    item.patients |= {str(header.get("PatientID") or "").strip()} - {""}
                if modality in IMAGE_MODALITIES:
                    item.images.setdefault(uid, []).append(file)
                    item.modality = modality
                elif modality in LABEL_MODALITIES:
                    item.labels.append(file)
                    item.names += _label_names(header)
                    item.referenced |= {str(e.value) for e in header.iterall() if e.keyword == "SeriesInstanceUID"} - {uid}
            except Exception:  # pydicom raises nearly anything on damaged headers; the file is then rejected when it is loaded
                item.images.setdefault("unreadable", []).append(file)
        return item


def _add_case(dataset: RawDataset, case_id: str, folder: Path, items: list[_Series], paint: Paint) -> None:
    images: dict[str, list[Path]] = {}
    for item in items:
        for uid, files in item.images.items():
            images.setdefault(uid, []).extend(files)
    labels = sorted(f for item in items for f in item.labels)
    referenced = set[str]().union(*(item.referenced for item in items))
    candidates = {uid: files for uid, files in images.items() if uid in referenced} or images
    if "unreadable" in images and len(candidates) == 1 and "unreadable" not in candidates:
        candidates = {uid: [*files, *images["unreadable"]] for uid, files in candidates.items()}
    if not labels or len(candidates) != 1:
        message = f"{len(candidates)} image series and {len(labels)} label objects; expected one series and its RTSTRUCT or SEG"
        finding = Finding("missing pair", "reject", message, "move other series away", str(folder), dataset.name, case_id)
        dataset.findings.append(finding)
        return
    (files,) = candidates.values()
    options = (("names", tuple(paint.values.items())), ("regions", paint.regions))
    dataset.cases.append(CaseRef(case_id, tuple(sorted(files)), tuple((f, 0) for f in labels), 0, options))


def _add_patients(dataset: RawDataset, people: Mapping[str, set[str]]) -> None:
    """Whose the cases are, by PatientID: studies of one person must not come into two parts. Hashed, since it may be a name."""
    ids = {c.case_id: min(people[c.case_id]) for c in dataset.cases if len(people[c.case_id]) == 1}
    if len(set(ids.values())) > 1:
        dataset.patients = {c: hashlib.blake2b(f"PatientID:{p}".encode(), digest_size=8).hexdigest() for c, p in ids.items()}
    elif len(ids) > 1:
        message = (
            f"{len(ids)} cases have the same PatientID: it was made anonymous, or they are one person; each counts as its own"
        )
        hint = "state `patient` or `patients` in the collection if some are one person"
        dataset.findings.append(Finding("patients", "warn", message, hint, str(dataset.root), dataset.name))


def _label_names(header: Dataset) -> list[str]:
    if header.Modality == "RTSTRUCT":
        return [str(roi.ROIName) for roi in header.get("StructureSetROISequence", [])]
    return [str(segment.SegmentLabel) for segment in header.get("SegmentSequence", [])]


def _read_only(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise RejectedError("unreadable", f"cannot be read ({error.strerror})", "check the path", str(path)) from None


def _some_files(path: Path) -> list[Path]:
    files: list[Path] = []
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            files.append(file)
            if len(files) >= PROBE_FILES:
                break
    return files
