"""Which case is for training, validation or test.

In order: the collection's `splits`; what the dataset itself states (splits_final.json, datalist parts, meta.csv); `held_out`
cases (of the collection, or nnU-Net's `imagesTs`) are the test part; what an existing store says; else 70 / 10 / 20 % (or the
shares of `parts`) by patient, drawn by a hash of the patient's name, so that it needs no seed, is the same everywhere, and a
patient is in one part over all datasets. With fewer than five patients `val` is empty; a single patient is for training.
Where some cases are held out the others are drawn into the other two parts. Stated and known parts stay: patients whom they
divide are warned of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from data_tools.findings import Finding
from data_tools.sources.raw import CaseRef
from hermes_dist.errors import ConfigError

PARTS = ("train", "val", "test")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
MIN_PATIENTS_FOR_VAL = 5


class HasSplits(Protocol):
    """What is needed of a dataset here."""

    name: str
    cases: list[CaseRef]
    split_of: dict[str, str]
    patient_of: dict[str, str]
    named: set[str]
    shares: Mapping[str, float]
    held_out: frozenset[str]
    findings: list[Finding]


def assign_splits(
    datasets: Sequence[HasSplits], splits: Mapping[str, Mapping[str, list[str]]], known: Mapping[tuple[str, str], str]
) -> None:
    """Fill `split_of` of every dataset; cases that a stated split leaves out are dropped with a note.

    Raises:
        ConfigError: a case in two parts, or an unknown part.
    """
    part_of_patient: dict[str, str] = {}
    undecided: list[HasSplits] = []
    for dataset in datasets:
        if dataset.name in splits:
            dataset.split_of = _stated(dataset, splits[dataset.name])
        elif not dataset.split_of:
            dataset.split_of = {
                c.case_id: known[dataset.name, c.case_id] for c in dataset.cases if (dataset.name, c.case_id) in known
            } | dict.fromkeys(sorted(dataset.held_out), "test")
            undecided.append(dataset)
            for case_id, part in dataset.split_of.items():
                part_of_patient.setdefault(dataset.patient_of[case_id], part)
            continue
        for case_id, part in dataset.split_of.items():
            if case_id in dataset.patient_of:
                part_of_patient.setdefault(dataset.patient_of[case_id], part)
        dropped = [c.case_id for c in dataset.cases if c.case_id not in dataset.split_of]
        if dropped:
            message = f"{len(dropped)} cases are in no part of the stated split and are left out, e.g. {dropped[0]}"
            dataset.findings.append(Finding("split", "warn", message, "add them to the split", dataset=dataset.name))
            dataset.cases = [c for c in dataset.cases if c.case_id in dataset.split_of]
    for dataset in undecided:
        _draw(dataset, part_of_patient)
    _warn_of_divided_patients(datasets)


def _warn_of_divided_patients(datasets: Sequence[HasSplits]) -> None:
    """Stated parts (or a store's, made before the patients were stated) may divide a patient: training then sees test patients.

    Cases whose patient nobody stated are left out: equal case ids in two datasets are mostly chance.
    """
    places: dict[str, dict[str, tuple[HasSplits, str]]] = {}
    for dataset in datasets:
        for case_id in (c.case_id for c in dataset.cases if c.case_id in dataset.named):
            places.setdefault(dataset.patient_of[case_id], {}).setdefault(dataset.split_of[case_id], (dataset, case_id))
    divided = {patient: found for patient, found in places.items() if len(found) > 1}
    if divided:
        patient, found = min(divided.items())
        where = " and ".join(f"{part} ({dataset.name}/{case_id})" for part, (dataset, case_id) in found.items())
        message = f"{len(divided)} patients are in more than one part, e.g. {patient!r} in {where}"
        hint = 'correct "splits"; without stated splits a store keeps the parts that it has: convert to another URL to draw anew'
        first, _ = next(iter(found.values()))
        first.findings.append(Finding("split", "warn", message, hint, dataset=first.name))


def _stated(dataset: HasSplits, parts: Mapping[str, list[str]]) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for part, ids in parts.items():
        if part not in PARTS:
            raise ConfigError(f"splits of dataset {dataset.name!r} has part {part!r}; expected {', '.join(PARTS)}")
        for case_id in ids:
            if case_id in split_of:
                raise ConfigError(
                    f"splits of dataset {dataset.name!r} names case {case_id!r} twice ({split_of[case_id]} and {part})"
                )
            split_of[case_id] = part
    known = {c.case_id for c in dataset.cases} | {f.case_id for f in dataset.findings}
    absent = [i for i in split_of if i not in known]
    if absent:
        message = f"{len(absent)} cases of the split are not there, e.g. {absent[0]}"
        dataset.findings.append(Finding("split", "warn", message, "correct the ids or add the cases", dataset=dataset.name))
    return split_of


def _draw(dataset: HasSplits, part_of_patient: dict[str, str]) -> None:
    patients = sorted({dataset.patient_of[c.case_id] for c in dataset.cases})
    quota = {part: round(share * len(patients)) for part, share in dataset.shares.items()}
    if len(patients) < MIN_PATIENTS_FOR_VAL:
        quota["val"] = 0
    quota["test"] = 0 if len(patients) == 1 or not dataset.shares["test"] else max(1, quota["test"])
    if dataset.held_out:
        drawn = len({p for p in patients if part_of_patient.get(p) != "test"})
        learn = dataset.shares["train"] + dataset.shares["val"]
        quota["test"] = len(patients) - drawn
        quota["val"] = round(drawn * dataset.shares["val"] / learn) if learn and drawn >= MIN_PATIENTS_FOR_VAL else 0
    for patient in patients:
        if patient in part_of_patient:
            quota[part_of_patient[patient]] -= 1
    for patient in sorted((p for p in patients if p not in part_of_patient), key=_draw_key):
        part = next((p for p in ("test", "val") if quota[p] > 0), "train")
        quota[part] -= 1
        part_of_patient[patient] = part
    dataset.split_of = {c.case_id: part_of_patient[dataset.patient_of[c.case_id]] for c in dataset.cases} | dataset.split_of


def _draw_key(patient: str) -> bytes:
    return hashlib.blake2b(f"split:{patient}".encode(), digest_size=8).digest()
