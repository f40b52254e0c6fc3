"""Keyed hashes and permutations: bijective, spread out, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.stream.keyed import hash64, integers, permute, text_key, uniform


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(count: int, key: int) -> None:
    image = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(image), np.arange(count))


def test_permute_mixes_sizes_and_keys_in_one_call() -> None:
    index, count, key = np.array([0, 5, 99, 0]), np.array([1, 6, 100, 10**12]), np.array([3, 4, 5, 6], np.uint64)
    together = permute(index, count, key)
    alone = [int(permute(i, c, k)) for i, c, k in zip(index, count, key, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_permute_sends_every_element_everywhere_equally_often(count: int) -> None:
    keys = np.arange(6000, dtype=np.uint64)
    table = np.stack([np.bincount(permute(np.full(6000, i), count, keys), minlength=count) for i in range(count)])
    expected = 6000 / count
    chi_square = ((table - expected) ** 2 / expected).sum()
    degrees = (count - 1) ** 2
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees) + 5


def test_hash_depends_on_every_part_and_on_their_order() -> None:
    values = {int(hash64(*parts)) for parts in [(1, 2), (2, 1), (1, 2, 0), (1, 3), (0, 2), (-1, 2)]}
    assert len(values) == 6


def test_values_never_change() -> None:
    """A changed value would silently change the order of every training that is resumed."""
    assert int(hash64(1, 2, 3)) == GOLDEN_HASH
    assert permute(np.arange(10), 10, 42).tolist() == GOLDEN_PERMUTATION
    assert text_key("liver") == GOLDEN_TEXT


def test_uniform_and_integers_cover_their_range() -> None:
    u = uniform(9, np.arange(20000))
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    counts = np.bincount(integers(7, 9, np.arange(70000)), minlength=7)
    assert counts.size == 7
    assert np.abs(counts - 10000).max() < 500


GOLDEN_HASH = 17824878756907967
GOLDEN_PERMUTATION = [7, 4, 1, 2, 3, 9, 0, 8, 6, 5]
GOLDEN_TEXT = 16349977603161993824
