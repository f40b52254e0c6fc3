"""The README's tree names every module, in the module's own words."""

from __future__ import annotations

from tests.contracts import tree


def test_the_tree_of_the_readme_is_that_of_the_project():
    _, body, _ = tree.parts((tree.ROOT / "README.md").read_text())
    assert body.strip() == tree.tree_text(), "run `python -m tests.contracts.tree`"


def test_every_module_says_what_it_is():
    silent = [p for room in tree.ROOMS for p in (tree.ROOT / room).rglob("*.py") if p.stat().st_size and not tree.first_line(p)]
    assert not silent
