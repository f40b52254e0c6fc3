"""What conversion remembers beside the store: the plan of an unfinished conversion, and the outcome of every case.

| object                              | written                     | read                                             |
|-------------------------------------|-----------------------------|--------------------------------------------------|
| `.staging/plan.json`                | before the first case       | by `merge` and other parts, on any host          |
| `.staging/outcomes/DATASET/CASE.json` | before a case is published | when the store is finished, after any kills      |
| `conversion.jsonl`                  | at the end, a line per case | by the next conversion, for unchanged cases      |
| `integrity.json`                    | at the end                  | by people and programs                           |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_tools.findings import Finding
from data_tools.jobs import Outcome
from hermes_dist.errors import StoreError
from hermes_dist.shards.case import safe_name
from hermes_dist.shards.many import delete_each, read_each
from hermes_dist.shards.remote import open_storage
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

PLAN = ".staging/plan.json"
OUTCOMES = ".staging/outcomes"
HISTORY = "conversion.jsonl"
INTEGRITY = "integrity.json"
LIMIT_BYTES = 1 << 32

Key = tuple[str, str]


@dataclass(frozen=True)
class StorePlan:
    """What an unfinished conversion is about: everything `merge` needs."""

    format: str
    tasks: TaskTable
    preprocessing: Preprocessing
    split_of: dict[Key, str]
    findings: list[Finding]
    digest: str = ""
    """Hash of all that decides what is stored: outcomes of another digest belong to another conversion."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description."""
        splits: dict[str, dict[str, str]] = {}
        for (dataset, case_id), split in self.split_of.items():
            splits.setdefault(dataset, {})[case_id] = split
        return {
            "format": self.format,
            "tasks": self.tasks.to_json(),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "splits": splits,
            "findings": [f.to_json() for f in self.findings],
            "digest": self.digest,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> StorePlan:
        """Inverse of `to_json`."""
        return StorePlan(
            data["format"],
            TaskTable.from_json(data["tasks"]),
            Preprocessing.model_validate(data["preprocessing"]),
            {(dataset, case_id): split for dataset, cases in data["splits"].items() for case_id, split in cases.items()},
            [Finding.from_json(f) for f in data["findings"]],
            data.get("digest", ""),
        )

    def differences(self, other: StorePlan) -> list[str]:
        """What another plan has otherwise, in words: `spacing_mm_zyx [1.5, 1.5, 1.5] there, [2.0, 2.0, 2.0] here`."""
        found: list[str] = []
        mine, theirs = ({"format": p.format, **p.preprocessing.model_dump(mode="json")} for p in (self, other))
        found += [f"{name} {theirs[name]} there, {value} here" for name, value in mine.items() if theirs[name] != value]
        if self.tasks != other.tasks:
            found.append("other datasets or classes")
        moved = sorted(k for k in self.split_of.keys() | other.split_of.keys() if self.split_of.get(k) != other.split_of.get(k))
        if moved:
            where = [p.split_of.get(moved[0], "absent") for p in (other, self)]
            found.append(f"{len(moved)} cases, e.g. {'/'.join(moved[0])} ({where[0]} there, {where[1]} here)")
        return found or ["label settings of a dataset, or the version of this program"]


class Journal:
    """Reads and writes those objects below one store URL; picklable."""

    def __init__(self, url: str) -> None:
        self._storage = open_storage(url)

    def write(self, outcome: Outcome) -> None:
        """Keep the outcome of a case, complete or not at all."""
        path = f"{OUTCOMES}/{safe_name(outcome.dataset)}/{safe_name(outcome.case_id)}.json"
        self._storage.write(path, json.dumps(outcome.to_json()).encode())

    def history(self) -> dict[Key, Outcome]:
        """Outcomes of the last finished conversion by case."""
        found: dict[Key, Outcome] = {}
        if self._storage.size(HISTORY) is not None:
            for line in self._storage.read(HISTORY, LIMIT_BYTES).splitlines():
                outcome = Outcome.from_json(json.loads(line))
                found[outcome.key] = outcome
        return found

    def staged(self) -> dict[Key, Outcome]:
        """Outcomes of the unfinished conversion by case."""
        found: dict[Key, Outcome] = {}
        for data in read_each(self._storage, list(self._storage.list(OUTCOMES)), LIMIT_BYTES):
            outcome = Outcome.from_json(json.loads(data))
            found[outcome.key] = outcome
        return found

    def join_plan(self, plan: StorePlan) -> None:
        """Refuse to be a part of another conversion than the one under way. Raises StoreError."""
        if self._storage.size(PLAN) is None:
            return
        live = self.read_plan()
        if live.digest != plan.digest:
            raise StoreError(
                f"{self._storage.url}: an unfinished conversion lies there that differs from this part: "
                f"{'; '.join(plan.differences(live)[:4])}; give every part the same arguments and data, or publish that "
                f"conversion with `hermes-shard merge`, or give it up by deleting {self._storage.url}/{PLAN}"
            )

    def drop_leftovers(self) -> None:
        """Outcomes without a plan were left by a clean-up that was killed, or given up: they must not count for the next plan."""
        if self._storage.size(PLAN) is None:
            delete_each(self._storage, list(self._storage.list(OUTCOMES)))

    def write_plan(self, plan: StorePlan) -> None:
        """State what is being converted."""
        self._storage.write(PLAN, json.dumps(plan.to_json()).encode())

    def confirm_plan(self, plan: StorePlan) -> None:
        """Make sure that this conversion is still the one under way. Raises StoreError."""
        if self._storage.size(PLAN) is None or self.read_plan().digest != plan.digest:
            raise StoreError(
                f"{self._storage.url}/{PLAN}: another conversion was started or published there while this part ran; let one "
                "conversion end before the next begins, and run this part again"
            )

    def read_plan(self) -> StorePlan:
        """The plan of the unfinished conversion. Raises StoreError if there is none."""
        if self._storage.size(PLAN) is None:
            raise StoreError(f"{self._storage.url} has no unfinished conversion; run `hermes-shard convert … --part i/n` first")
        return StorePlan.from_json(json.loads(self._storage.read(PLAN, LIMIT_BYTES)))

    def publish(self, outcomes: Iterable[Outcome], findings: Iterable[Finding]) -> None:
        """Write history and integrity report, and drop what was unfinished."""
        self._storage.write(HISTORY, "".join(json.dumps(o.to_json()) + "\n" for o in outcomes).encode())
        self._storage.write(INTEGRITY, (json.dumps([f.to_json() for f in findings], indent=1) + "\n").encode())
        self._storage.delete(PLAN)  # first: as long as there is a plan, all its outcomes are there for `merge`
        delete_each(self._storage, list(self._storage.list(OUTCOMES)))

    def write_findings(self, findings: Iterable[Finding]) -> None:
        """Write the integrity report alone (a conversion that published nothing)."""
        self._storage.write(INTEGRITY, (json.dumps([f.to_json() for f in findings], indent=1) + "\n").encode())

    def read_findings(self) -> list[Finding]:
        """The integrity report of the finished store (empty where there is none)."""
        if self._storage.size(INTEGRITY) is None:
            return []
        return [Finding.from_json(f) for f in json.loads(self._storage.read(INTEGRITY, LIMIT_BYTES))]
