"""What `check` and `convert` print: the findings as a table, grouped so that a thousand equal notes are one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data_tools.convert import ConversionReport
from data_tools.findings import ORDER, Finding
from data_tools.progress import clock, size_text, wide_console

EXAMPLES = 3


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """One line per kind of finding and dataset: severity, check, cases, an example and what to do."""
    console = console or wide_console()
    if not findings:
        console.print("no findings")
        return
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.dataset, finding.check, finding.suggestion), []).append(finding)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("severity", "dataset", "check", "n", "example", "what to do"):
        table.add_column(column, overflow="fold")
    for (severity, dataset, check, suggestion), items in groups.items():
        names = ", ".join(f.case_id for f in items[:EXAMPLES] if f.case_id)
        more = f" (+{len(items) - EXAMPLES})" if len(items) > EXAMPLES else ""
        example = f"{names}{more}: {items[0].message}" if names else items[0].message
        table.add_row(severity, dataset, check, str(len(items)), example, suggestion)
    console.print(table)


def summary(report: ConversionReport) -> str:
    """The last lines of a conversion."""
    counts = report.counts
    lines = [
        f"{counts['converted']} converted, {counts['unchanged']} unchanged, {counts['rejected']} rejected, "
        f"{len(report.removed)} removed in {clock(report.seconds)}"
    ]
    if report.stored_bytes:
        lines[0] += f"; read {size_text(report.input_bytes)}, stored {size_text(report.stored_bytes)}"
    if report.removed:
        lines.append(
            "removed: " + ", ".join("/".join(k) for k in report.removed[:10]) + (" …" if len(report.removed) > 10 else "")
        )
    if report.rejected:
        lines.append("quarantined: " + ", ".join(f"{f.dataset}/{f.case_id}" for f in report.rejected[:10]))
    if report.collection:
        tasks = report.collection.tasks
        lines.append(
            f"wrote {report.collection.n_cases} cases, {len(tasks.datasets)} datasets, {tasks.n_tasks} tasks to {report.url} "
            f"({report.collection.format}, digest {report.collection.digest}); findings in integrity.json"
        )
    return "\n".join(lines)


def severity_line(findings: Sequence[Finding]) -> str:
    """`2 reject, 1 warn, 7 note`."""
    return ", ".join(f"{sum(f.severity == s for f in findings)} {s}" for s in ORDER)
