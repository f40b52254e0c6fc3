"""Layouts that list their files in a JSON: the Medical Segmentation Decathlon's `dataset.json`, and MONAI datalists.

| layout   | file                 | labels              | lists                                                   |
|----------|----------------------|---------------------|---------------------------------------------------------|
| msd      | `FOLDER/dataset.json`| value → name        | `training` [{image, label}], `test` [path]; 4D = channels |
| datalist | any `.json`          | value → name, or none | `training`, `validation`, `testing` [{image, label, fold}] |

Paths are relative to the file's folder. `._name` junk is skipped. A fold number makes fold 0 the validation part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.files import read_json
from data_tools.findings import Finding
from data_tools.sources.labels import modality_of, parse_labels
from data_tools.sources.raw import CaseRef, RawCase, RawDataset
from data_tools.sources.volumes import fingerprint_files, load_files, stem_of
from hermes_dist.errors import SourceError

LISTS = {"training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test"}


class MsdSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """A folder with a `dataset.json` that has `training` and `modality`."""
        data = read_json(path / "dataset.json") if (path / "dataset.json").is_file() else None
        return isinstance(data, dict) and "training" in data and "modality" in data and "channel_names" not in data

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """List the cases of `training`."""
        return _open(path / "dataset.json", "msd", options)

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


class DatalistSource:
    """See `raw.Source`."""

    def detect(self, path: Path) -> bool:
        """A JSON file with a `training` list, or a folder with exactly one."""
        return _find(path) is not None

    def open(self, path: Path, options: Mapping[str, Any]) -> RawDataset:
        """List the cases of all lists that carry labels."""
        file = _find(path)
        if file is None:
            raise SourceError(f"{path}: no MONAI datalist (one JSON file with a `training` list)")
        return _open(file, "datalist", options)

    def load(self, case: CaseRef) -> RawCase:
        """Read one case."""
        return load_files(case)

    def fingerprint(self, case: CaseRef) -> str:
        """The digest that `load` would return."""
        return fingerprint_files(case)


def _is_datalist(file: Path) -> bool:
    data = read_json(file)
    return isinstance(data, dict) and isinstance(data.get("training", data.get("train")), list)


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".json" and _is_datalist(path) else None
    if (path / "dataset.json").is_file():
        return None
    files = [f for f in sorted(path.glob("*.json")) if not f.name.startswith(".") and _is_datalist(f)]
    return files[0] if len(files) == 1 else None


def _open(file: Path, layout: str, options: Mapping[str, Any]) -> RawDataset:
    data = read_json(file)
    if not isinstance(data, dict):
        raise SourceError(f"{file}: expected an object")
    channel = int(options.get("channel", 0))
    classes, ignore = parse_labels(data["labels"], file) if data.get("labels") else ([], None)
    name = str(data.get("name") or (file.parent.name if layout == "msd" else file.stem))
    modality = data.get("modality")
    modality = modality if isinstance(modality, str) else modality_of(modality, channel)
    dataset = RawDataset(name, layout, file.parent, [], classes, modality=modality, ignore_value=ignore)
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    folds: dict[str, int] = {}
    seen: set[str] = set()
    for key, part in LISTS.items():
        entries = data.get(key)
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, Mapping) or not entry.get("label"):
                continue  # an image without a label: nothing to convert
            case = _case(dataset, entry, channel, seen)
            if case is not None:
                parts[part].append(case.case_id)
                if isinstance(entry.get("fold"), int):
                    folds[case.case_id] = entry["fold"]
    dataset.splits = _splits(parts, folds)
    return dataset


def _case(dataset: RawDataset, entry: Mapping[str, Any], channel: int, seen: set[str]) -> CaseRef | None:
    images = entry.get("image")
    paths = [dataset.root / str(p) for p in (images if isinstance(images, list) else [images])]
    files_of_channels = isinstance(images, list) and (len(paths) > 1 or channel == 0)  # else a file holds all channels
    label = dataset.root / str(entry["label"])
    if not paths or (files_of_channels and channel >= len(paths)):
        message = f"no image of channel {channel}, the list has {len(paths)}"
        finding = Finding("missing pair", "reject", message, "add it or remove the entry", str(label))
        dataset.findings.append(finding.at(dataset.name, stem_of(label)))
        return None
    image = paths[channel if files_of_channels else 0]
    if image.name.startswith("._") or label.name.startswith("._"):
        return None
    if not image.is_file():  # nnU-Net v1 kept this file and added the channel number to the images
        suffix = image.name[len(stem_of(image)) :]
        image = image.with_name(f"{stem_of(image)}_{channel:04d}{suffix}")
        files_of_channels |= image.is_file()
    case_id = stem_of(label)
    if case_id in seen:  # case folders with equal file names
        case_id = f"{label.parent.name}_{case_id}"
    missing = next((p for p in (image, label) if not p.is_file()), None)
    if missing is not None or case_id in seen:
        message = "listed, but not there" if missing else "listed twice"
        finding = Finding(
            "missing pair", "reject", message, "add it or remove the entry", str(missing or label), dataset.name, case_id
        )
        dataset.findings.append(finding)
        return None
    seen.add(case_id)
    case = CaseRef(case_id, (image,), ((label, None),), channel, (("channel_is_file", files_of_channels),))
    dataset.cases.append(case)
    return case


def _splits(parts: dict[str, list[str]], folds: dict[str, int]) -> dict[str, list[str]] | None:
    """The file's own parts; where everything is `training`, fold 0 is validation; without folds nothing is stated."""
    if parts["val"] or parts["test"]:
        return parts
    if len(set(folds.values())) > 1:
        val = [c for c in parts["train"] if folds.get(c) == 0]
        return {"train": [c for c in parts["train"] if folds.get(c) != 0], "val": val, "test": []}
    return None
