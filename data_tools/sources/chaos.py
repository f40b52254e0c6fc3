"""Layout `chaos`: DICOM slices with one PNG mask a slice, as the CHAOS challenge ships them.

`PATIENT/T1DUAL/DICOM_anon/InPhase/*.dcm` with `PATIENT/T1DUAL/Ground/*.png` (both phases share the masks), and
`PATIENT/T2SPIR/DICOM_anon/*.dcm` with `PATIENT/T2SPIR/Ground/*.png`. A case is one folder of slices, called
`PATIENT_T1DUAL_InPhase`, `PATIENT_T2SPIR`. The masks carry no positions: the n-th PNG by name belongs to the n-th slice by
name, numbers in names by their value. Slices are then ordered by position, masks with them; every slice of CHAOS has a series
number of its own, so a folder is taken as one series.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.findings import Finding, RejectedError
from data_tools.sources.inflate import file_digest
from data_tools.sources.raw import CaseRef, RawCase, RawDataset, case_digest
from data_tools.sources.series import files_in, is_dicom, read_dataset, slice_order, stack

SLICES, MASKS = "DICOM_anon", "Ground"
MR_VALUES = {"liver": 63, "right_kidney": 126, "left_kidney": 189, "spleen": 252}


class ChaosSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """Folders of slices beside folders of masks."""
        return has_masks(path)

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:  # noqa: ARG002, the protocol's signature
        """One case per folder of slices. Without declared labels the grey values of CHAOS' MR masks are taken."""
        dataset = RawDataset(path.name, "chaos", path, [], [(name, (value,)) for name, value in MR_VALUES.items()])
        for slices in sorted(path.rglob(SLICES)):
            masks = slices.parent / MASKS
            for folder in [slices, *sorted(p for p in slices.iterdir() if p.is_dir())]:
                files = [f for f in _files(folder) if is_dicom(f)]
                if files:
                    _add_case(dataset, folder, files, [f for f in _files(masks) if f.suffix.lower() == ".png"])
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        digests: list[str] = []
        slices = [read_dataset(file, digests) for file in case.images]
        folder = str(case.image_path)
        order = slice_order(slices, folder)
        image, grid = stack(slices, folder)
        label = np.empty(image.shape, np.uint8)
        for z, index in enumerate(order):
            label[z] = _read_mask(case.labels[index][0], image.shape[1:])
        digests += [file_digest(path) for path, _ in case.labels]
        return RawCase(image, grid, label, grid, case_digest(digests, case))

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return case_digest([file_digest(path) for path in case.files], case)


def has_masks(path: Path) -> bool:
    """A folder `DICOM_anon` beside a folder `Ground`, at most three levels down."""
    found = (f for depth in ("", "*/", "*/*/") for f in path.glob(depth + SLICES)) if path.is_dir() else ()
    return any((f.parent / MASKS).is_dir() for f in found)


def _files(folder: Path) -> list[Path]:
    """By name, where 10 follows 9 whether or not there are leading zeros: masks are paired with slices by this order."""
    return sorted(files_in(folder), key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", f.name)])


def _add_case(dataset: RawDataset, folder: Path, slices: list[Path], masks: list[Path]) -> None:
    parts = [p for p in folder.relative_to(dataset.root).parts if p != SLICES]
    case_id = "_".join(parts) or dataset.root.name
    if len(masks) != len(slices):
        message = f"{len(slices)} slices and {len(masks)} masks; expected one mask a slice"
        finding = Finding("missing pair", "reject", message, "complete the folder, or move it away", str(folder))
        dataset.findings.append(finding.at(dataset.name, case_id))
        return
    dataset.cases.append(CaseRef(case_id, tuple(slices), tuple((f, None) for f in masks)))
    dataset.patients[case_id] = parts[0] if parts else case_id


def _read_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """One plane of grey values (a black and white mask has 0 and 255)."""
    try:
        with Image.open(path, formats=["PNG"]) as png:
            if png.size != shape[::-1]:
                message = f"a mask of {png.size[0]} × {png.size[1]} pixels, the slice has {shape[1]} × {shape[0]}"
                raise RejectedError("label grid", message, "obtain the mask of this series", str(path))
            if png.mode not in ("L", "1"):
                message = f"a PNG of mode {png.mode}, expected grey values of 8 bits"
                raise RejectedError("label", message, "write the masks as 8-bit grey", str(path))
            return np.asarray(png.convert("L"))
    except RejectedError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        message = f"the mask cannot be read ({type(error).__name__}: {error})"
        raise RejectedError("label", message, "obtain the file anew", str(path)) from None
