"""Collection files: which raw datasets make up a shard store, what they annotate, and which case is for what.

A collection is the user's JSON; `read_collection_file` resolves it against the disk: cases are listed (no voxels are read),
classes, modality and splits settled. Adding a dataset means adding an entry, never editing code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_tools.entries import DatasetEntry, PatientTable, SplitTable, first_problem, parse_collection
from data_tools.files import read_json
from data_tools.findings import Finding
from data_tools.sources import SOURCES
from data_tools.sources.names import of_dataset, printable, usable_names
from data_tools.sources.raw import CaseRef, ClassValues, RawDataset, used_values
from data_tools.splits import PARTS, SHARES, assign_splits
from hermes_dist.errors import ConfigError, SourceError, UsageError, nearest
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing


@dataclass
class ResolvedDataset:
    """A dataset as it will be converted.

    `declared_values`: every label value that may occur (a subset of classes may be used). `split_of`, `patient_of`: by case id.
    `named`: cases whose patient is stated; any other counts as its own. `listed`: all ids of the source, whether chosen or not.
    `shares`, `held_out`: how cases without a stated split are drawn.
    """

    name: str
    modality: str
    region: str
    layout: str
    root: Path
    classes: list[ClassValues]
    ignore_value: int | None
    declared_values: frozenset[int]
    cases: list[CaseRef]
    trust_image_grid: bool = False
    split_of: dict[str, str] = field(default_factory=dict[str, str])
    patient_of: dict[str, str] = field(default_factory=dict[str, str])
    named: set[str] = field(default_factory=set[str])
    listed: frozenset[str] = frozenset()
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    held_out: frozenset[str] = frozenset()
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def class_names(self) -> list[str]:
        """Names of the annotated classes, in order."""
        return [name for name, _ in self.classes]

    def cases_of(self, split: str) -> list[CaseRef]:
        """Cases of one split."""
        return [c for c in self.cases if self.split_of.get(c.case_id) == split]

    def test_cases(self) -> list[CaseRef]:
        """Cases of the test split."""
        return self.cases_of("test")


@dataclass
class ResolvedCollection:
    """All datasets with their preprocessing."""

    name: str
    datasets: list[ResolvedDataset]
    shared_tasks: list[list[str]]
    preprocessing: Preprocessing

    def task_table(self) -> TaskTable:
        """The task table. Raises TaskError: duplicate names, or shared names that do not exist."""
        rows = [(d.name, d.modality, d.region, d.classes, d.ignore_value) for d in self.datasets]
        return TaskTable.build(rows, self.shared_tasks)


def read_collection_file(path: Path, known_splits: Mapping[tuple[str, str], str] | None = None) -> ResolvedCollection:
    """Resolve a collection file against the disk.

    Args:
        path: the JSON file; paths inside are relative to it.
        known_splits: (dataset, case id) → split of an existing store; a case keeps it where the collection states none.

    Raises:
        ConfigError: unknown or wrong keys. SourceError: a dataset that cannot be opened.
    """
    file = parse_collection(path)
    splits = _inline(file.splits, path, TypeAdapter(SplitTable), "dataset → train / val / test → list of case ids")
    patients = _inline(file.patients, path, TypeAdapter(PatientTable), "dataset → case id → patient")
    datasets = [_resolve(entry, path.parent) for entry in file.datasets]
    names = [d.name for d in datasets]
    for table, what in ((splits, "splits"), (patients, "patients")):
        for name in table.keys() - set(names):
            raise ConfigError(f"{path}: {what} names dataset {name!r}, which the collection does not have.{nearest(name, names)}")
    for entry, dataset in zip(file.datasets, datasets, strict=True):
        _add_patients(dataset, patients.get(dataset.name, {}), entry.patient)
    assign_splits(datasets, splits, known_splits or {})
    return ResolvedCollection(file.name, datasets, file.shared_tasks, preprocessing_of(file.preprocessing, str(path)))


def collection_of_sources(
    sources: Sequence[Path],
    *,
    layout: str = "auto",
    modality: str | None = None,
    known_splits: Mapping[tuple[str, str], str] | None = None,
) -> ResolvedCollection:
    """A collection of raw datasets that were named on the command line. Raises as `read_collection_file`."""
    entries = [DatasetEntry(name=_safe_dataset_name(s), path=str(s.resolve()), layout=layout, modality=modality) for s in sources]
    names = [e.name for e in entries]
    for name in {n for n in names if names.count(n) > 1}:
        raise UsageError(f"two sources are called {name!r}; rename one, or write a collection file with a name for each")
    datasets = [_resolve(e, Path()) for e in entries]
    assign_splits(datasets, {}, known_splits or {})
    return ResolvedCollection("sources", datasets, [], Preprocessing())


def preprocessing_of(overrides: Mapping[str, Any], where: str) -> Preprocessing:
    """Defaults with overrides. Raises ConfigError naming the field."""
    try:
        return Preprocessing(**overrides)
    except ValidationError as error:
        raise ConfigError(f"{where}: preprocessing: {first_problem(error, list(Preprocessing.model_fields))}") from None


def _inline(value: Any, path: Path, form: TypeAdapter[Any], expected: str) -> dict[str, Any]:
    """A table that the collection holds, or names the file of."""
    try:
        return form.validate_python(read_json(path.parent / value) if isinstance(value, str) else value or {})
    except ValidationError as error:
        place = "/".join(str(p) for p in error.errors()[0]["loc"])
        raise ConfigError(f"{path.parent / str(value)}: {place}: expected an object, {expected}") from None


def _add_patients(dataset: ResolvedDataset, stated: Mapping[str, str], pattern: str | None) -> None:
    """Take over the collection's table, and tell what does not fit: such cases count as patients of their own, and may leak."""
    found = {c.case_id: stated[c.case_id] for c in dataset.cases if c.case_id in stated}
    dataset.patient_of.update(found)
    dataset.named |= found.keys()
    if absent := sorted(stated.keys() - dataset.listed):
        message = f"{len(absent)} cases of `patients` are not there, e.g. {absent[0]}"
        dataset.findings.append(Finding("patients", "warn", message, "correct the ids or add the cases", dataset=dataset.name))
    if pattern and (loose := [c.case_id for c in dataset.cases if c.case_id not in dataset.named]):
        message = f"`patient` {pattern!r} fits {len(loose)} case ids not, e.g. {loose[0]}; each counts as its own patient"
        dataset.findings.append(Finding("patients", "warn", message, "correct the expression", dataset=dataset.name))


def detect_layout(path: Path) -> str:
    """The layout of a raw dataset. Raises SourceError if none or several fit."""
    if not path.exists():
        raise SourceError(f"{path} does not exist; {_why_absent(path)}")
    fits = [name for name, source in SOURCES.items() if source.detect(path)]
    if len(fits) != 1:
        found = f"looks like {' and '.join(fits)}" if fits else f"is none of {', '.join(SOURCES)}"
        raise SourceError(
            f"{path} {found}; name the layout with --layout or in the collection, docs/convert-my-data.md shows each"
        )
    return fits[0]


def _why_absent(path: Path) -> str:
    if re.search(r"(^|/)(s3|gs|az|https?):/", path.as_posix()):  # a Path holds one slash of the two
        return "raw data are read from a file system: mount or copy the bucket; only the store (--out) is written by URL"
    return "check the path"


def _resolve(entry: DatasetEntry, base: Path) -> ResolvedDataset:
    root = (base / entry.path).resolve()
    layout = detect_layout(root) if entry.layout == "auto" else entry.layout
    if layout not in SOURCES:
        raise ConfigError(
            f"dataset {entry.name!r}: layout {layout!r} is not one of {', '.join(SOURCES)}.{nearest(layout, list(SOURCES))}"
        )
    if not root.exists():
        raise SourceError(f"dataset {entry.name!r}: {root} does not exist; {_why_absent(root)} (relative to the collection file)")
    stated = _stated_values(entry)
    options = {
        "modality": entry.modality,
        "channel": entry.channel,
        "fold": entry.fold,
        "labels": list(stated or entry.labels or []),
        "label_ids": list(stated.values()) if stated else None,
    }
    options |= {k: v for k in ("overlap", "image_suffix", "image_files", "label_files", "frames") if (v := getattr(entry, k))}
    raw = SOURCES[layout].open(root, options)
    modality = entry.modality or raw.modality
    if not modality:
        raise UsageError(
            f"dataset {entry.name!r}: the modality is not stated; give --modality or set `modality` in the collection"
        )
    classes = _classes(entry, raw, stated)
    ignore = entry.ignore_value if entry.ignore_value is not None else raw.ignore_value
    if ignore in used_values(classes):
        raise ConfigError(
            f"dataset {entry.name!r}: value {ignore} is to be ignored and belongs to a class; it can be one of both"
        )
    cases, odd_names = usable_names(raw)
    chosen = [c for c in cases if not entry.include or re.search(entry.include, c.case_id)]
    dataset = ResolvedDataset(
        name=entry.name,
        modality=modality,
        region=entry.region or raw.region or "unknown",
        layout=layout,
        root=root,
        classes=classes,
        ignore_value=ignore,
        declared_values=frozenset(
            used_values(classes) | used_values(raw.classes) | ({ignore} if ignore else set()) | set(entry.other_values)
        ),
        cases=chosen,
        trust_image_grid=entry.trust_image_grid,
        findings=[
            of_dataset(f, entry.name)
            for f in [*raw.findings, *odd_names]
            if not entry.include or not f.case_id or re.search(entry.include, f.case_id)
        ],
    )
    if not dataset.cases and not dataset.findings:
        raise SourceError(f"dataset {entry.name!r}: no case found in {root}; check `path`, `layout` ({layout}) and `include`")
    part_of = {case_id: part for part, ids in (raw.splits or {}).items() for case_id in ids}
    dataset.split_of = {c.case_id: part_of[c.case_id] for c in chosen if c.case_id in part_of}
    patients = {c.case_id: _patient(entry, raw, c.case_id) for c in chosen}
    dataset.patient_of = {case_id: patient or case_id for case_id, patient in patients.items()}
    dataset.named = {case_id for case_id, patient in patients.items() if patient}
    dataset.listed = frozenset([*(c.case_id for c in raw.cases), *(f.case_id for f in raw.findings)])
    if entry.parts:
        dataset.shares = {part: entry.parts.get(part, 0) / sum(entry.parts.values()) for part in PARTS}
    dataset.held_out = raw.held_out & dataset.patient_of.keys()
    if entry.held_out:
        inside = {c.case_id: _inside(c, root) for c in chosen}
        dataset.held_out = frozenset(i for i, name in inside.items() if re.search(entry.held_out, name))
        if inside and not dataset.held_out:
            message = f"`held_out` {entry.held_out!r} fits no image path, e.g. {next(iter(inside.values()))}"
            dataset.findings.append(Finding("split", "warn", message, "correct the expression", dataset=entry.name))
    return dataset


def _patient(entry: DatasetEntry, raw: RawDataset, case_id: str) -> str | None:
    found = re.search(entry.patient, case_id) if entry.patient else None
    return found[1] if found else raw.patients.get(case_id)


def _inside(case: CaseRef, root: Path) -> str:
    """The image's path below the dataset (or the whole of it, for a file map that leads elsewhere)."""
    image = case.image_path
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.as_posix()


def _stated_values(entry: DatasetEntry) -> dict[str, tuple[int, ...]] | None:
    """Class → values, where the collection states values; the background is no class. Raises ConfigError."""
    if isinstance(entry.labels, dict):
        pairs = list(entry.labels.items())
        if entry.label_ids is not None:
            raise ConfigError(f"dataset {entry.name!r}: `labels` holds the values already; remove `label_ids`")
    elif entry.label_ids is None:
        return None
    elif len(entry.label_ids) != len(entry.labels or []):
        raise ConfigError(
            f"dataset {entry.name!r}: {len(entry.labels or [])} labels but {len(entry.label_ids)} label_ids; one id each"
        )
    else:
        pairs = list(zip(entry.labels or [], entry.label_ids, strict=True))
    values = {n: tuple(v) if isinstance(v, list) else (v,) for n, v in pairs}
    if len(values) != len(pairs):
        names = [n for n, _ in pairs]
        double = next(n for n in names if names.count(n) > 1)
        raise ConfigError(f"dataset {entry.name!r}: label {double!r} is named twice; a list of ids makes one label of several")
    classes = {n: v for n, v in values.items() if v != (0,)}
    if not classes:
        raise ConfigError(f"dataset {entry.name!r}: `labels` names only the background (0); name at least one class")
    return classes


def _classes(entry: DatasetEntry, raw: RawDataset, stated: dict[str, tuple[int, ...]] | None) -> list[ClassValues]:
    """Declared classes: the collection's where it has some, else the dataset's own."""
    if raw.painted and raw.classes:  # the source was told what to paint, and says which values that gave
        return raw.classes
    if stated is not None:
        return list(stated.items())
    if entry.labels is None:
        if not raw.classes:
            raise SourceError(f"dataset {entry.name!r} declares no classes; set `labels` and `label_ids` in the collection")
        return raw.classes
    own = dict(raw.classes)
    missing = next((n for n in entry.labels if n not in own), None)
    if missing is not None and own:
        raise ConfigError(
            f"dataset {entry.name!r} has no label {missing!r}; it has {', '.join(own)}.{nearest(missing, list(own))}"
        )
    return [(n, own.get(n, (i,))) for i, n in enumerate(entry.labels, 1)]


def _safe_dataset_name(source: Path) -> str:
    name = source.resolve().name if source.is_dir() else source.resolve().parent.name
    return printable(re.sub(r"^(Dataset|Task)\d+_", "", name) or name)
