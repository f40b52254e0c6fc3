"""Layouts that are nothing but folders.

| layout     | looks like                                                                                         |
|------------|----------------------------------------------------------------------------------------------------|
| folder     | `images/X.nrrd` with `labels/X.nrrd`, class names in `labels.json` (value → name)                   |
| classfiles | one file per class (TotalSegmentator): `s0001/ct.nii.gz`, `s0001/segmentations/liver.nii.gz`, …     |
| bids       | derivatives: `…/sub-1_dseg.nii.gz` with `dseg.tsv` (index, name), images by the same entities        |
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.files import read_json
from data_tools.findings import Finding, RejectedError
from data_tools.sources.labels import parse_labels
from data_tools.sources.raw import CaseRef, ClassValues, RawCase, RawDataset
from data_tools.sources.volumes import (
    fingerprint_files,
    is_volume,
    load_files,
    paint_of,
    read_volume,
    stem_of,
    volumes_in,
)
from hermes_dist.errors import SourceError

IMAGE_FOLDERS = ("images", "image", "imagesTr", "img", "volumes", "scans")
LABEL_FOLDERS = ("labels", "label", "labelsTr", "masks", "mask", "segmentations", "seg")
CLASS_IMAGE_STEMS = ("ct", "mri", "mr", "image", "pet")
BIDS_FREE = frozenset({"space", "desc", "label", "seg", "res", "atlas", "den"})
BIDS_SUFFIX = {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "PET": "pet", "CT": "ct"}


class FolderSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """An image and a label folder side by side."""
        return _pair(path) is not None and not (path / "dataset.json").is_file()

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """Pair files by name. Without `labels.json` and without declared labels, classes are named after the values found."""
        folders = _pair(path)
        if folders is None:
            raise SourceError(
                f"{path}: no folder of images ({', '.join(IMAGE_FOLDERS)}) beside one of labels ({', '.join(LABEL_FOLDERS)})"
            )
        dataset = RawDataset(path.name, "folder", path, [], [])
        images = _by_case(dataset, volumes_in(folders[0]))
        labels = _by_case(dataset, volumes_in(folders[1]))
        for case_id in sorted(images.keys() | labels.keys()):
            if case_id in images and case_id in labels:
                dataset.cases.append(
                    CaseRef(case_id, (images[case_id],), ((labels[case_id], None),), int(options.get("channel", 0)))
                )
                continue
            severity = "reject" if case_id in images else "warn"
            message = "image without a label" if case_id in images else "label without an image"
            file = str(images.get(case_id) or labels[case_id])
            dataset.findings.append(
                Finding("missing pair", severity, message, "add the missing file", file, dataset.name, case_id)
            )
        if (path / "labels.json").is_file():
            dataset.classes, dataset.ignore_value = parse_labels(read_json(path / "labels.json"), path / "labels.json")
        elif not options.get("labels"):
            dataset.classes = _values_found(dataset)
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _pair(path: Path) -> tuple[Path, Path] | None:
    image = next((path / n for n in IMAGE_FOLDERS if volumes_in(path / n)), None)
    label = next((path / n for n in LABEL_FOLDERS if volumes_in(path / n)), None)
    return (image, label) if image and label else None


def _by_case(dataset: RawDataset, files: list[Path]) -> dict[str, Path]:
    """Case id → file; of two files with one id the first is taken, and that is said."""
    found: dict[str, Path] = {}
    for file in files:
        case_id = stem_of(file).removesuffix("_0000")
        if found.setdefault(case_id, file) is not file:
            message = f"a second file of this name; {found[case_id].name} is used"
            dataset.findings.append(Finding("name", "warn", message, "remove one", str(file), dataset.name, case_id))
    return found


def _values_found(dataset: RawDataset) -> list[ClassValues]:
    values: set[int] = set()
    for case in dataset.cases:
        try:
            values |= {int(v) for v in np.unique(read_volume(case.labels[0][0]).values()) if v > 0 and v == int(v)}
        except RejectedError:
            continue  # the case is read again, and rejected, when it is its turn
    names = [f"label_{v}" for v in sorted(values)]
    message = f"no labels.json: classes are named after the {len(names)} values found"
    dataset.findings.append(
        Finding("labels", "warn", message, "write labels.json: {value: name}", str(dataset.root), dataset.name)
    )
    return [(f"label_{v}", (v,)) for v in sorted(values)]


class ClassFilesSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """A case folder with an image and a `segmentations` folder."""
        return bool(_class_cases(path))

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """Classes are the file names found anywhere; what they paint: `paint_of`."""
        cases = _class_cases(path)
        if not cases:
            raise SourceError(f"{path}: no case folder with an image ({', '.join(CLASS_IMAGE_STEMS)}) and `segmentations/`")
        dataset = RawDataset(path.name, "classfiles", path, [], [])
        found = sorted({stem_of(f) for folder, _ in cases for f in volumes_in(folder / "segmentations")})
        names = [str(n) for n in options.get("labels") or found]
        paint = paint_of(names, options, path)
        dataset.classes, dataset.painted = paint.classes, True
        for folder, image in cases:
            files = {stem_of(f): f for f in volumes_in(folder / "segmentations")}
            labels = tuple((files[n], paint.values[n]) for n in names if n in files)
            absent = [n for n in names if n not in files]
            if absent:
                message = f"no file for {', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}: taken as absent"
                finding = Finding("missing pair", "warn" if labels else "reject", message, "add empty masks", str(folder))
                dataset.findings.append(finding.at(dataset.name, folder.name))
            if labels:
                dataset.cases.append(CaseRef(folder.name, (image,), labels, 0, (("regions", paint.regions),)))
        dataset.splits = _totalseg_splits(path / "meta.csv", [c.case_id for c in dataset.cases])
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _class_cases(path: Path) -> list[tuple[Path, Path]]:
    """(case folder, image) of every folder that has an image beside `segmentations/`; the path itself may be one case."""
    candidates = [path, *sorted(p for p in path.iterdir() if p.is_dir())] if path.is_dir() else []
    cases: list[tuple[Path, Path]] = []
    for folder in candidates:
        if (folder / "segmentations").is_dir():
            image = next((f for stem in CLASS_IMAGE_STEMS for f in volumes_in(folder) if stem_of(f) == stem), None)
            if image:
                cases.append((folder, image))
    return cases


def _totalseg_splits(file: Path, ids: list[str]) -> dict[str, list[str]] | None:
    """`meta.csv` of the TotalSegmentator dataset: `image_id;…;split;…`."""
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        rows = list(csv.DictReader(text, delimiter=";"))
    part_of = {str(r.get("image_id")): str(r.get("split")) for r in rows}
    if not {"train", "val", "test"} & set(part_of.values()):
        return None
    return {part: [i for i in ids if part_of.get(i) == part] for part in ("train", "val", "test")}


class BidsSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """A `sub-*` tree with discrete segmentations."""
        return path.is_dir() and any(path.glob("sub-*")) and next(path.rglob("*_dseg.nii*"), None) is not None

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """Pair each `_dseg` with the raw image of the same entities (here, or in the raw tree two folders up)."""
        dataset = RawDataset(path.name, "bids", path, [], [] if options.get("label_ids") else _bids_classes(path))
        roots = [path, *(p for p in (path.parent.parent,) if path.parent.name == "derivatives")]
        wanted = options.get("image_suffix") or BIDS_SUFFIX.get(str(options.get("modality", "")))
        images: dict[frozenset[str], list[Path]] = {}
        for file in (f for root in roots for f in sorted(root.rglob("sub-*.nii*")) if is_volume(f)):
            if "_dseg." not in file.name and "_probseg." not in file.name:
                images.setdefault(_entities(stem_of(file)), []).append(file)
        for file in sorted(f for f in path.rglob("*_dseg.nii*") if is_volume(f)):
            case_id = stem_of(file).removesuffix("_dseg")
            entities = _entities(stem_of(file)) - _free_entities(stem_of(file))
            fits = [f for f in images.get(entities, []) if wanted is None or stem_of(f).endswith(f"_{wanted}")]
            if len(fits) != 1:
                message = f"{len(fits)} images with the entities {' '.join(sorted(entities))}"
                hint = 'set "image_suffix" (T1w, bold, …) of this dataset' if fits else "add the image"
                dataset.findings.append(Finding("missing pair", "reject", message, hint, str(file), dataset.name, case_id))
                continue
            dataset.cases.append(CaseRef(case_id, (fits[0],), ((file, None),), int(options.get("channel", 0))))
            dataset.patients[case_id] = case_id.partition("_")[0]
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _entities(stem: str) -> frozenset[str]:
    return frozenset(part for part in stem.split("_") if re.fullmatch(r"[a-zA-Z]+-[a-zA-Z0-9]+", part))


def _free_entities(stem: str) -> set[str]:
    return {part for part in _entities(stem) if part.split("-")[0] in BIDS_FREE}


def _bids_classes(path: Path) -> list[ClassValues]:
    """All tables together; a name of several values is a region. Raises SourceError where two tables name a value differently."""
    stated: dict[int, tuple[str, Path]] = {}
    for file in sorted(path.rglob("*dseg.tsv")):
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
            rows = list(csv.DictReader(text, delimiter="\t"))
        try:
            found = [(int(r["index"]), str(r["name"])) for r in rows]
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{file}: expected the columns `index` (whole numbers) and `name`") from None
        for value, name in found:
            other, where = stated.setdefault(value, (name, file))
            if other != name:
                raise SourceError(
                    f"value {value} is {other!r} in {where} and {name!r} in {file}; make the label maps alike, or state the "
                    "values with `labels` and `label_ids` in the collection, one dataset for each table (`include`)"
                )
    labels: dict[str, list[int]] = {}
    for value, (name, _) in stated.items():
        labels.setdefault(name, []).append(value)
    return parse_labels(labels, path)[0] if labels else []
