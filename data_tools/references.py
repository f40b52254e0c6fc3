"""Raw label maps for evaluation on the scans' own grids: what was annotated, before anything was resampled."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from data_tools.collection import read_collection_file
from data_tools.findings import RejectedError
from data_tools.sources import SOURCES
from hermes_dist.errors import DataError
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.volume.geometry import Placement


class RawReferences:
    """Looks up a stored case in the collection from which it was converted.

    Args:
        collection: the collection file.

    Attributes:
        digest: names the collection: another one has other labels, or lacks other cases.

    Raises:
        ConfigError, SourceError: as `read_collection_file`.
    """

    def __init__(self, collection: Path) -> None:
        self._path = collection
        self._cases = {(d.name, c.case_id): (d.layout, c) for d in read_collection_file(collection).datasets for c in d.cases}
        # Its paths are relative to where it lies.
        place = f"{collection.resolve()}\n".encode()
        self.digest = hashlib.blake2b(place + collection.read_bytes(), digest_size=8).hexdigest()

    def __call__(self, row: ManifestRow) -> np.ndarray | None:
        """Label map on the case's original grid (Z Y X); None, with a line on stderr, for a case that is not in the collection.

        Raises:
            DataError: the label cannot be read any more, or lies on another grid than at conversion.
        """
        found = self._cases.get((row.dataset, row.case_id))
        if found is None:
            print(f"{row.name} is not in {self._path}: scored on the stored grid", file=sys.stderr, flush=True)
            return None
        layout, case = found
        try:
            raw = SOURCES[layout].load(case)
        except RejectedError as error:
            raise DataError(f"{row.name}: {error}") from error
        expected = Placement.from_json(json.loads(row.placement)).original.shape_vox_zyx
        if tuple(raw.label_zyx.shape) != tuple(expected):
            raise DataError(
                f"{case.files[-1]}: label of {raw.label_zyx.shape} voxels (Z Y X), expected {tuple(expected)} as converted"
            )
        return raw.label_zyx
