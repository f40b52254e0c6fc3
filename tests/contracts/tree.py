"""The tree in the README: every module with the first line of its docstring. `python -m tests.contracts.tree` rewrites it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hermes_dist", "data_tools", "launch", "monitoring")
BEGIN, END = "<!-- tree: begin (python -m tests.contracts.tree) -->", "<!-- tree: end -->"


def first_line(path: Path) -> str:
    """What a module says it is; empty for a package without words."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].rstrip(".")


def tree_text() -> str:
    """The tree as fenced text."""
    lines: list[str] = []
    for room in ROOMS:
        folder = None
        for path in sorted((ROOT / room).rglob("*.py"), key=lambda p: (p.parent, p.name)):
            if path.name == "__init__.py" and not first_line(path):
                continue
            if path.parent != folder:
                folder = path.parent
                lines.append(f"{folder.relative_to(ROOT)}/")
            lines.append(f"  {path.name:<22} {first_line(path)}")
    return "\n".join(["```", *lines, "```"])


def parts(readme: str) -> tuple[str, str, str]:
    """The README before, within and after the markers."""
    head, _, rest = readme.partition(BEGIN)
    body, _, tail = rest.partition(END)
    return head, body, tail


if __name__ == "__main__":
    target = ROOT / "README.md"
    before, _, after = parts(target.read_text())
    target.write_text(f"{before}{BEGIN}\n\n{tree_text()}\n\n{END}{after}")
