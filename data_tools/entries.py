"""The keys of a collection file, as its author writes them: typed, each with a line of documentation, unknown ones named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_tools.files import read_json
from hermes_dist.errors import ConfigError, nearest

INFORMATION = frozenset(
    {"canonical_labels", "cases", "patients", "channels", "licence", "license", "citation", "source", "notes", "file_ending",
     "label_source", "roi_names", "description", "reference", "release", "unverified", "fields", "paper", "sizes"}
)  # fmt: skip
"""Keys that people write for people."""


Text = Annotated[str, Field(min_length=1, pattern=r"^[^/\x00-\x1f\x7f]+$")]
ClassName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Value = Annotated[int, Field(ge=0, le=65535)]
LabelValue = Annotated[int, Field(ge=1, le=65535)]
SplitTable = dict[str, dict[str, list[str]]]
PatientTable = dict[str, dict[str, str]]


class DatasetEntry(BaseModel):
    """One dataset of a collection file."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: Text
    """Unique name; tasks are called `name/class`."""
    path: str
    """Folder (or datalist file), relative to the collection file."""
    layout: str = "auto"
    """One of SOURCES, or auto."""
    modality: Text | None = None
    """CT, PET, T1, T2, FLAIR, cineMRI, …; MR where the sequence is not stated. Default: what the dataset itself says."""
    region: str | None = None
    """Body region, for people."""
    labels: Annotated[list[ClassName] | dict[ClassName, Value | list[Value]], Field(min_length=1)] | None = None
    """Class names (in the order of label_ids), or name → value(s). Default: what the dataset itself says."""
    label_ids: list[LabelValue | list[LabelValue]] | None = None
    """Label value (or values, for a region) of each name."""
    ignore_value: LabelValue | None = None
    """Voxels of this value were annotated by nobody."""
    other_values: list[Value] = []
    """Label values that may occur and belong to no class: background here."""
    include: str | None = None
    """Regular expression that a case id must match."""
    patient: str | None = None
    """Regular expression on the case id whose first group names the patient (see `patients` of the collection, which wins)."""
    held_out: str | None = None
    """Regular expression on the image's path: a release of its own, for testing; the other cases are drawn into train and val."""
    parts: dict[Literal["train", "val", "test"], Annotated[int, Field(ge=0)]] | None = None
    """Published numbers of train, val and test; where no split is stated the draw has these shares (default 70 : 10 : 20)."""
    channel: int = Field(default=0, ge=0)
    """Which channel of multi-channel images."""
    fold: int = Field(default=0, ge=0)
    """Which fold of nnU-Net's splits_final.json."""
    overlap: Literal["regions", "priority"] | None = None
    """One file per class: keep overlaps (at most 8 classes), or let the later class win."""
    image_suffix: str | None = None
    """BIDS: suffix of the image (T1w, T2w, …)."""
    image_files: str | None = None
    """Layout pattern: relative path of the images with `*` for what names the case."""
    label_files: str | None = None
    """Layout pattern: relative path of the labels with `*` for what names the case."""
    frames: Literal["labelled"] | None = None
    """Layout pattern: image and label are cines, and each labelled frame is a case."""
    trust_image_grid: bool = False
    """Labels of the image's shape lie on its grid, whatever their header says."""

    @field_validator("include", "patient", "held_out")
    @classmethod
    def _is_regular_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("parts")
    @classmethod
    def _has_training_cases(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        if value is not None and not value.get("train"):
            raise ValueError("needs at least one case for train")
        return value

    @field_validator("patient")
    @classmethod
    def _names_the_patient(cls, value: str | None) -> str | None:
        if value is not None and not re.compile(value).groups:
            raise ValueError("needs a group in parentheses that names the patient")
        return value


class CollectionFile(BaseModel):
    """A collection file as written."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    datasets: list[DatasetEntry] = Field(min_length=1)
    """The datasets, in the order of their task ids."""
    name: str = "collection"
    """For people."""
    version: int = 1
    """Of the collection, for people."""
    splits: str | SplitTable | None = None
    """dataset → train / val / test → case ids, or a file with that."""
    patients: str | PatientTable | None = None
    """dataset → case id → patient, or a file with that; default: every case is its own patient."""
    shared_tasks: list[list[str]] = []
    """Groups of `dataset/class` that are one task."""
    preprocessing: dict[str, Any] = {}
    """Overrides of the preprocessing defaults."""


def parse_collection(path: Path) -> CollectionFile:
    """Read and validate a collection file. Raises ConfigError naming the key, SourceError where it is no JSON."""
    data = read_json(path)
    try:
        file = CollectionFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, list(DatasetEntry.model_fields))}") from None
    known = {CollectionFile: list(CollectionFile.model_fields), DatasetEntry: list(DatasetEntry.model_fields)}
    for item, where in [(file, "collection"), *((d, f"dataset {d.name!r}") for d in file.datasets)]:
        for key in (item.model_extra or {}).keys() - INFORMATION:
            hint = nearest(key, known[type(item)])
            if hint:  # an unknown key that looks like one of ours is a typing error; any other is somebody's own remark
                raise ConfigError(f"{path}: {where} has an unknown key {key!r}.{hint}")
    return file


def first_problem(error: ValidationError, known: list[str]) -> str:
    """Where the first of pydantic's problems is, what it is, and the nearest known name for an unknown one."""
    problem = error.errors()[0]
    place = ".".join(str(p) for p in problem["loc"])
    hint = nearest(str(problem["loc"][-1]), known) if problem["type"] == "extra_forbidden" else ""
    return f"{place}: {problem['msg']} (got {problem.get('input')!r}).{hint}"
