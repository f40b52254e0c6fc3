"""Case ids must be text, and unique within their dataset: they name cases in stores, manifests, splits and reports."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from data_tools.findings import Finding
from data_tools.sources.raw import CaseRef, RawDataset


def usable_names(dataset: RawDataset) -> tuple[list[CaseRef], list[Finding]]:
    """Cases with a usable id, and a finding for each that is left out. File names that are not UTF-8 are shown escaped."""
    seen: dict[str, CaseRef] = {}
    findings: list[Finding] = []
    for case in dataset.cases:
        file = printable(str(case.image_path))
        if not case.case_id or printable(case.case_id) != case.case_id:
            message = "the name is empty, not UTF-8, or holds control characters"
        elif case.case_id in seen:
            message = f"a second case of this name (the first is {printable(str(seen[case.case_id].image_path))})"
        else:
            seen[case.case_id] = case
            continue
        findings.append(Finding("name", "reject", message, "rename it", file, dataset.name, printable(case.case_id)))
    return list(seen.values()), findings


def of_dataset(finding: Finding, dataset: str) -> Finding:
    """A finding of listing, attributed to the dataset's name in the collection, safe to print."""
    return replace(finding, dataset=dataset, case_id=printable(finding.case_id), file=printable(finding.file))


def printable(text: str) -> str:
    """The text with undecodable bytes and control characters written as escapes."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in safe)
