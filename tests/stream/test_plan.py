"""The plan: exact shares, no repeats within a pass, the same from anywhere."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.config import MixtureConfig
from hermes_dist.errors import ConfigError
from hermes_dist.stream.mixture import shares
from hermes_dist.stream.plan import Group, Plan

SIZES = (3, 40, 11, 1, 7)


def make_plan(sizes: tuple[int, ...] = SIZES, seed: int = 1, alpha: float = 0.5, block: int = 32) -> Plan:
    groups = [Group(f"d{i}", i, np.arange(n) + 1000 * i) for i, n in enumerate(sizes)]
    return Plan(seed, groups, shares([g.name for g in groups], sizes, MixtureConfig(alpha=alpha)), block=block)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 2**63),
    block=st.integers(1, 80),
    start=st.integers(0, 10**6),
)
def test_against_a_plain_count(sizes: list[int], seed: int, block: int, start: int) -> None:
    """Second implementation: walk a window and check every promise by counting."""
    plan = make_plan(tuple(sizes), seed=seed, block=block)
    rows = plan.rows(start, start + 6 * block)
    first_full = -(-start // block) * block - start
    for b in range(first_full, len(rows) - block + 1, block):
        counted = np.bincount(rows.group[b : b + block], minlength=len(sizes))
        assert counted.tolist() == plan._counts[(start + b) // block % plan.period].tolist()
    passes: dict[tuple[int, int], list[int]] = defaultdict(list)
    last: dict[int, int] = {}
    for group, draw, case in zip(rows.group.tolist(), rows.draw.tolist(), rows.case.tolist(), strict=True):
        assert draw == last.get(group, draw - 1) + 1
        last[group] = draw
        passes[group, draw // sizes[group]].append(case)
    for (group, _), cases in passes.items():
        assert len(set(cases)) == len(cases)
        assert set(cases) <= set(range(1000 * group, 1000 * group + sizes[group]))


def test_a_pass_shows_every_case_and_passes_differ() -> None:
    plan = make_plan((40,), alpha=1)
    rows = plan.rows(0, 120)
    passes = [rows.case[i : i + 40].tolist() for i in (0, 40, 80)]
    assert all(sorted(p) == list(range(40)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3


def test_shares_over_a_long_run_are_those_asked_for() -> None:
    plan = make_plan()
    rows = plan.rows(0, 60000)
    expected = shares([g.name for g in plan.groups], SIZES, MixtureConfig())
    np.testing.assert_allclose(np.bincount(rows.group) / 60000, expected, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 10**12), length=st.integers(0, 100), cut=st.integers(0, 100))
def test_any_window_is_part_of_the_same_order(start: int, length: int, cut: int) -> None:
    plan = make_plan()
    whole, cut = plan.rows(start, start + length), min(cut, length)
    left, right = plan.rows(start, start + cut), plan.rows(start + cut, start + length)
    for name in ("position", "group", "dataset", "case", "draw", "foreground", "crop_seed", "augment_seed"):
        joined = np.concatenate([getattr(left, name), getattr(right, name)])
        assert np.array_equal(joined, getattr(whole, name))


def test_seeds_differ_between_positions_purposes_and_runs() -> None:
    a, b = make_plan(seed=1).rows(0, 5000), make_plan(seed=2).rows(0, 5000)
    assert len(np.unique(np.concatenate([a.crop_seed, a.augment_seed, b.crop_seed, b.augment_seed]))) == 20000
    assert not np.array_equal(a.case, b.case)
    assert abs(a.foreground.mean() - 0.5) < 0.03


def test_substitutes_are_the_cases_of_the_next_draws() -> None:
    plan = make_plan()
    rows = plan.rows(0, 500)
    of_group = np.flatnonzero(rows.group == 1)
    for here, there in pairwise(of_group):
        assert plan.substitute(1, int(rows.draw[here]), 1) == rows.case[there]


def test_digest_names_everything_that_moves_the_order() -> None:
    digests = {make_plan().digest, make_plan(seed=2).digest, make_plan(block=16).digest, make_plan((3, 40, 11, 1, 8)).digest}
    assert len(digests) == 4
    assert make_plan().digest == make_plan().digest


def test_order_never_changes() -> None:
    """A changed value would silently change the order of every training that is resumed."""
    rows = make_plan().rows(10**9, 10**9 + 8)
    assert rows.case.tolist() == GOLDEN_CASES


def test_empty_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="no dataset"):
        Plan(0, [], np.ones(0))
    with pytest.raises(ConfigError, match="'d0' has no case"):
        make_plan((0,), alpha=0)


GOLDEN_CASES = [2, 1021, 1011, 1029, 1002, 4002, 1013, 4006]
