"""Layout `pattern`: any naming, by two patterns of the collection file.

`image_files` and `label_files` are relative paths with `*`; what the stars stand for, joined by `_`, is the case id and pairs the
two: `case_*/imaging.nii.gz` with `case_*/segmentation.nii.gz`, `volume-*.nii` with `segmentation-*.nii`, `img/img*.nii.gz` with
`label/label*.nii.gz`. A star matches within one path component.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.findings import Finding
from data_tools.sources.raw import CaseRef, RawCase, RawDataset
from data_tools.sources.volumes import fingerprint_files, is_volume, load_files
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
        images, labels = (_matches(path, p) for p in patterns)
        dataset = RawDataset(path.name, "pattern", path, [], [])
        for case_id in sorted(images.keys() | labels.keys()):
            if case_id in images and case_id in labels:
                channel = int(options.get("channel", 0))
                dataset.cases.append(CaseRef(case_id, (images[case_id],), ((labels[case_id], None),), channel))
                continue
            severity = "reject" if case_id in images else "warn"
            message = "image without a label" if case_id in images else "label without an image"
            file = str(images.get(case_id) or labels[case_id])
            dataset.findings.append(
                Finding("missing pair", severity, message, "add the missing file", file, dataset.name, case_id)
            )
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _matches(root: Path, pattern: str) -> dict[str, Path]:
    """Case id → file. Raises SourceError where two files have one id."""
    expression = re.compile("([^/]*)".join(re.escape(part) for part in pattern.split("*")))
    found: dict[str, Path] = {}
    for file in sorted(root.glob(pattern)):
        match = expression.fullmatch(file.relative_to(root).as_posix())
        if match and is_volume(file):
            case_id = "_".join(match.groups())
            if case_id in found:
                raise SourceError(f"{found[case_id]} and {file} would both be case {case_id!r}; make the pattern more specific")
            found[case_id] = file
    return found
