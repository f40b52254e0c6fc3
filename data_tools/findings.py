"""What conversion has to say about a file: findings, and the exception by which a reader rejects one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hermes_dist.errors import SourceError

Severity = Literal["reject", "warn", "note"]
ORDER: tuple[Severity, ...] = ("reject", "warn", "note")


@dataclass(frozen=True)
class Finding:
    """One line of `integrity.json`. `reject` = the case is quarantined, `warn` = look at it, `note` = something was fixed."""

    check: str
    severity: Severity
    message: str
    suggestion: str = ""
    file: str = ""
    dataset: str = ""
    case_id: str = ""

    def at(self, dataset: str, case_id: str, file: str = "") -> Finding:
        """The same finding, attributed to a case (a file that is already named stays)."""
        return replace(self, dataset=dataset, case_id=case_id, file=self.file or file)

    def to_json(self) -> dict[str, Any]:
        """Keys in the order of the documented format."""
        row = asdict(self)
        return {k: row[k] for k in ("dataset", "case_id", "file", "check", "severity", "message", "suggestion")}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Finding:
        """Inverse of `to_json`."""
        return Finding(**row)


class RejectedError(SourceError):
    """A scan that must not be converted; `finding` says why and what to do."""

    def __init__(self, check: str, message: str, suggestion: str, file: str = "") -> None:
        super().__init__(f"{file + ': ' if file else ''}{message}; {suggestion}")
        self.finding = Finding(check, "reject", message, suggestion, file)

    def __reduce__(self) -> tuple[Any, ...]:
        f = self.finding
        return RejectedError, (f.check, f.message, f.suggestion, f.file)


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Worst first, then by dataset, case and check."""
    return sorted(findings, key=lambda f: (ORDER.index(f.severity), f.dataset, f.case_id, f.check, f.file, f.message))
