"""Layout `pattern`: any naming, by two patterns of the collection file.

`image_files` and `label_files` are relative paths with `*`; what the stars stand for is the case id and pairs the two:
`case_*/imaging.nii.gz` with `case_*/segmentation.nii.gz`, `volume-*.nii` with `segmentation-*.nii`. A star matches within one
path component, `**/` any number of folders (which do not count for the id). Several different stars are joined by `_`, equal
ones count once: `Patient_*/Patient_*.nii.gz` pairs with `Patient_*/GT.nii.gz`. A file that fits both patterns is a label.

With `frames: "labelled"` image and label are cines of equal length (M&Ms), and every frame with a label is a case: `ID_0`,
`ID_1`, … in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.findings import Finding, RejectedError
from data_tools.sources.raw import CaseRef, RawCase, RawDataset
from data_tools.sources.volumes import fingerprint_files, is_volume, load_files, read_volume
from hermes_dist.errors import SourceError


class PatternSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:  # noqa: ARG002, the protocol's signature
        """Never: patterns are stated, not guessed."""
        return False

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """Pair the files of both patterns."""
        patterns = [str(options.get(key) or "") for key in ("image_files", "label_files")]
        if any("*" not in p or ".." in Path(p).parts or Path(p).is_absolute() for p in patterns):
            raise SourceError(
                f"{path}: layout pattern needs `image_files` and `label_files`, relative and with `*`; got {patterns}"
            )
        labels = _matches(path, patterns[1], set())
        images = _matches(path, patterns[0], set(labels.values()))
        dataset = RawDataset(path.name, "pattern", path, [], [])
        for case_id in sorted(images.keys() | labels.keys()):
            if case_id not in images or case_id not in labels:
                severity = "reject" if case_id in images else "warn"
                message = "image without a label" if case_id in images else "label without an image"
                file = str(images.get(case_id) or labels[case_id])
                finding = Finding("missing pair", severity, message, "add the missing file", file, dataset.name, case_id)
                dataset.findings.append(finding)
            elif options.get("frames"):
                _add_frames(dataset, case_id, images[case_id], labels[case_id])
            else:
                channel = int(options.get("channel", 0))
                dataset.cases.append(CaseRef(case_id, (images[case_id],), ((labels[case_id], None),), channel))
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _add_frames(dataset: RawDataset, case_id: str, image: Path, label: Path) -> None:
    """One case per labelled frame. Which frames are labelled is known from the label's voxels alone, so that file is read."""
    try:
        array = read_volume(label).array
    except RejectedError as error:
        dataset.findings.append(error.finding.at(dataset.name, case_id))
        return
    frames = [t for t, frame in enumerate(array) if frame.any()] if array.ndim == 4 else []
    if not frames:
        message = "no frame is labelled" if array.ndim == 4 else f"the label has shape {array.shape}, expected a cine (4D)"
        finding = Finding("frames", "reject", message, 'remove "frames" from the collection, or the file', str(label))
        dataset.findings.append(finding.at(dataset.name, case_id))
    for number, t in enumerate(frames):
        name = f"{case_id}_{number}"
        dataset.cases.append(CaseRef(name, (image,), ((label, None),), t, (("frame", True),)))
        dataset.patients[name] = case_id


def _matches(root: Path, pattern: str, excluded: set[Path]) -> dict[str, Path]:
    """Case id → file. Raises SourceError where two files have one id."""
    escaped = re.escape(pattern).replace(r"\*\*/", "(?:[^/]+/)*").replace(r"\*", "([^/]*)")
    found: dict[str, Path] = {}
    for file in sorted(root.glob(pattern)):
        match = re.fullmatch(escaped, file.relative_to(root).as_posix())
        if match and file not in excluded and is_volume(file):
            case_id = "_".join(dict.fromkeys(match.groups()))
            if case_id in found:
                raise SourceError(f"{found[case_id]} and {file} would both be case {case_id!r}; make the pattern more specific")
            found[case_id] = file
    return found
