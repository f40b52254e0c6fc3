"""nnU-Net v2 raw: `dataset.json`, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, or the explicit file map `dataset`.

Honoured: regions, ignore label, `file_ending`, `splits_final.json` (fold 0 unless `fold` says otherwise), `imagesTs` where
`labelsTs` has labels: these cases are for testing. One channel is read (`channel`, default 0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from data_tools.files import read_json
from data_tools.findings import Finding
from data_tools.sources.labels import modality_of, parse_labels
from data_tools.sources.raw import CaseRef, RawCase, RawDataset
from data_tools.sources.volumes import fingerprint_files, load_files
from hermes_dist.errors import SourceError

CHANNEL_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$", re.DOTALL)


class NnunetSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """`dataset.json` with `channel_names`, or with name → value labels."""
        file = path / "dataset.json"
        if not file.is_file():
            return False
        data = read_json(file)
        return isinstance(data, dict) and ("channel_names" in data or "file_ending" in data)

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """List cases from the file map or the folders."""
        file = path / "dataset.json"
        data = read_json(file)
        if not isinstance(data, dict):
            raise SourceError(f"{file}: expected an object")
        classes, ignore = parse_labels(data.get("labels"), file)
        channel = int(options.get("channel", 0))
        modality = modality_of(data.get("channel_names"), channel)
        name = str(data.get("name") or path.name)
        dataset = RawDataset(name, "nnunet", path, [], classes, modality=modality, ignore_value=ignore)
        test: list[str] = []
        if "dataset" in data:
            _from_map(dataset, data["dataset"], file, channel)
        else:
            ending = str(data.get("file_ending", ".nii.gz"))
            _from_folders(dataset, "imagesTr", "labelsTr", ending, channel)
            if (path / "labelsTs").is_dir():
                test = _from_folders(dataset, "imagesTs", "labelsTs", ending, channel)
        dataset.splits = _splits(path, dataset, test, int(options.get("fold", 0)))
        dataset.held_out = frozenset(test)
        return dataset

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _from_map(dataset: RawDataset, files: Any, source: Path, channel: int) -> None:
    if not isinstance(files, Mapping):
        raise SourceError(f"{source}: `dataset` must map case ids to {{'images': […], 'label': …}}")
    for case_id, entry in sorted(files.items()):
        try:
            images, label = {c: dataset.root / p for c, p in enumerate(entry["images"])}, dataset.root / entry["label"]
        except (KeyError, TypeError):
            raise SourceError(f"{source}: case {case_id!r} of `dataset` needs `images` (a list) and `label`") from None
        _add(dataset, str(case_id), images, label, channel)


def _from_folders(dataset: RawDataset, images: str, labels: str, ending: str, channel: int) -> list[str]:
    """Add the cases of a pair of folders; returns their ids."""
    if not (dataset.root / images).is_dir():
        raise SourceError(f"{dataset.root / images} does not exist; an nnU-Net raw dataset keeps its images there")
    by_case: dict[str, dict[int, Path]] = {}
    for file in sorted((dataset.root / images).iterdir()):
        if file.name.startswith(".") or not file.name.endswith(ending):
            continue
        match = CHANNEL_FILE.match(file.name[: -len(ending)])
        if match is None:
            message = "the name lacks the channel number, e.g. CASE_0000" + ending
            dataset.findings.append(Finding("name", "warn", message, "rename it", str(file), dataset.name))
            continue
        by_case.setdefault(match["case"], {})[int(match["channel"])] = file
    folder = dataset.root / labels
    for case_id, channels in by_case.items():
        _add(dataset, case_id, channels, folder / f"{case_id}{ending}", channel)
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        case_id = file.name.removesuffix(ending)
        if not file.name.startswith(".") and file.name.endswith(ending) and case_id not in by_case:
            finding = Finding("missing pair", "warn", "label without an image", "add the image or remove it", str(file))
            dataset.findings.append(finding.at(dataset.name, case_id))
    return list(by_case)


def _add(dataset: RawDataset, case_id: str, images: Mapping[int, Path], label: Path, channel: int) -> None:
    """Add a case, by the numbers of its channels: where one is missing, the next one must not take its place."""
    if channel not in images or not label.is_file() or not images[channel].is_file():
        missing = "label" if not label.is_file() else f"image of channel {channel}"
        finding = Finding(
            "missing pair", "reject", f"no {missing}", "add it or remove the case", str(label), dataset.name, case_id
        )
        dataset.findings.append(finding)
        return
    if len(images) > 1:
        note = Finding(
            "channel", "note", f"channel {channel} of {len(images)} is used", 'choose with "channel"', str(images[channel])
        )
        dataset.findings.append(note.at(dataset.name, case_id))
    options = (("channel_is_file", True),)
    dataset.cases.append(CaseRef(case_id, (images[channel],), ((label, None),), channel, options))


def _ids(value: Any) -> list[str]:
    """A list of case ids. Raises TypeError: anything else, such as a list of lists."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list of case ids")
    odd = [i for i in cast(list[Any], value) if not isinstance(i, str)]
    if odd:
        raise TypeError(f"{odd[0]!r} is not a case id in quotes")
    return cast(list[str], value)


def _splits(path: Path, dataset: RawDataset, test: list[str], fold: int) -> dict[str, list[str]] | None:
    file = path / "splits_final.json"
    ids = [c.case_id for c in dataset.cases]
    if not file.is_file():
        return None
    folds = read_json(file)
    try:
        train, val = _ids(folds[fold]["train"]), _ids(folds[fold]["val"])
    except (KeyError, IndexError, TypeError) as error:
        found = f" ({error})" if isinstance(error, TypeError) else ""
        raise SourceError(
            f"{file}: no fold {fold} with `train` and `val`{found}; expected nnU-Net's list of folds, each with two lists "
            "of case ids: correct the file, or choose another `fold`"
        ) from None
    listed = {*train, *val}
    rest = [i for i in ids if i not in listed]
    unlisted = len(set(rest) - set(test))
    if both := sorted(set(train) & set(val)):
        message = f"{len(both)} cases are in both parts of fold {fold}, e.g. {both[0]}; they are kept for validation alone"
        dataset.findings.append(Finding("split", "warn", message, "correct the split", str(file), dataset.name))
    if unlisted:
        message = f"{unlisted} cases are in neither part of fold {fold}; they become test cases"
        dataset.findings.append(Finding("split", "note", message, "list them in the split", str(file), dataset.name))
    return {"train": train, "val": val, "test": rest}
