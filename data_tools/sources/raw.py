"""What every source yields: a case's image, label, grid and the findings that came up while reading."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.findings import Finding
from hermes_dist.volume.geometry import Grid


@dataclass
class RawVolume:
    """One volume as it lies on disk. Real values are `array * slope + intercept`; axes Z Y X (4D: C Z Y X)."""

    array: np.ndarray
    grid: Grid
    digest: str
    slope: float = 1.0
    intercept: float = 0.0
    findings: list[Finding] = field(default_factory=list[Finding])

    def values(self) -> np.ndarray:
        """Real values: the stored array itself where no scaling is stated, else float32."""
        return self.scaled(self.array)

    def scaled(self, part: np.ndarray) -> np.ndarray:
        """Real values of a part of `array`."""
        if self.slope == 1 and self.intercept == 0:
            return part
        scaled = part.astype(np.float32)
        scaled *= np.float32(self.slope)
        scaled += np.float32(self.intercept)
        return scaled


@dataclass(frozen=True)
class CaseRef:
    """Where one case's files are; small and picklable, so that it can travel to a worker.

    `labels` pairs each label file with the value it paints (None = the file is a label map itself).
    """

    case_id: str
    images: tuple[Path, ...]
    labels: tuple[tuple[Path, int | None], ...]
    channel: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def image_path(self) -> Path:
        """The image file, or the folder of a DICOM series."""
        return self.images[0] if len(self.images) == 1 else self.images[0].parent

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, in order."""
        return (*self.images, *(path for path, _ in self.labels))


@dataclass
class RawCase:
    """One case as read: image and label on their grids, the content hash of every byte read, and findings."""

    image_zyx: np.ndarray
    grid: Grid
    label_zyx: np.ndarray
    label_grid: Grid
    digest: str
    findings: list[Finding] = field(default_factory=list[Finding])


ClassValues = tuple[str, tuple[int, ...]]


@dataclass
class RawDataset:
    """What a source found in one folder: cases, declared classes, and whatever else the layout states.

    `held_out`: ids of cases that are for testing, where `splits` states nothing. `patients`: case id → patient, as far as known.
    `painted`: the source makes the label maps out of masks, so `classes` are the values in them, whatever is declared elsewhere.
    """

    name: str
    layout: str
    root: Path
    cases: list[CaseRef]
    classes: list[ClassValues]
    modality: str | None = None
    region: str | None = None
    ignore_value: int | None = None
    splits: dict[str, list[str]] | None = None
    held_out: frozenset[str] = frozenset()
    patients: dict[str, str] = field(default_factory=dict[str, str])
    findings: list[Finding] = field(default_factory=list[Finding])
    painted: bool = False


class Source(Protocol):
    """One raw layout."""

    def detect(self, path: Path) -> bool:
        """True if `path` is certainly of this layout."""
        ...

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """List cases and classes without reading any voxels. Raises SourceError where the layout is broken as a whole."""
        ...

    def load(self, case: CaseRef) -> RawCase:
        """Read one case. Raises RejectedError where a file is damaged."""
        ...

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return, from the files' bytes alone: nothing is decoded."""
        ...


def case_digest(file_digests: Sequence[str], case: CaseRef) -> str:
    """Content hash of a case: every byte of its files, and how they are to be read."""
    text = "|".join([*file_digests, str([value for _, value in case.labels]), str(case.channel), str(case.options)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def used_values(classes: Sequence[ClassValues]) -> set[int]:
    """All label values that belong to a class."""
    return {v for _, values in classes for v in values}
