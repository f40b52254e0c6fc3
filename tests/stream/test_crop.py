"""Where patches begin."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.stream.crop import choose_start

NONE = np.empty((0, 3), np.int32)
NOTHING, ONE = np.zeros(0, np.int32), np.ones(1, np.int32)
SIDES = st.tuples(*[st.integers(1, 60)] * 3)


@settings(max_examples=100, deadline=None)
@given(shape=SIDES, patch=SIDES, seed=st.integers(0, 2**64 - 1), centred=st.booleans())
def test_patch_lies_inside_or_surrounds_the_volume(
    shape: tuple[int, int, int], patch: tuple[int, int, int], seed: int, centred: bool
) -> None:
    voxel = np.array([[s - 1 for s in shape]], np.int32)
    weights = np.ones(1) if centred else None
    start = choose_start(shape=shape, patch=patch, seed=seed, weights=weights, counts=ONE, foreground=lambda _: voxel)
    for s, p, a, v in zip(shape, patch, start, voxel[0], strict=True):
        if p <= s:
            assert 0 <= a <= s - p
            assert not centred or a <= v < a + p
        else:
            assert a == (s - p) // 2


def test_all_starts_are_reached_the_last_one_included() -> None:
    starts = [
        choose_start(shape=(12, 10, 10), patch=(10, 10, 10), seed=s, weights=None, counts=NOTHING, foreground=lambda _: NONE)
        for s in range(600)
    ]
    counts = np.bincount([s[0] for s in starts])
    assert counts.size == 3
    assert counts.min() > 150


def test_classes_are_drawn_by_weight_among_those_present() -> None:
    voxels = [np.array([[k, 50, 50]], np.int32) * [40, 1, 1] for k in range(4)]
    voxels[3] = NONE
    weights = np.array([1.0, 3.0, 0.0, 5.0])
    counts = np.asarray([len(v) for v in voxels])
    sides = {"shape": (200, 100, 100), "patch": (4, 4, 4)}
    start = [choose_start(**sides, seed=s, weights=weights, counts=counts, foreground=voxels.__getitem__)[0] for s in range(4000)]
    drawn = np.bincount((np.asarray(start) + 20) // 40, minlength=4)
    assert drawn[2] == drawn[3] == 0
    assert abs(drawn[1] / 4000 - 0.75) < 0.03


def test_without_foreground_the_crop_is_anywhere() -> None:
    sides = {"shape": (30, 30, 30), "patch": (8, 8, 8)}
    both = [choose_start(**sides, seed=3, weights=w, counts=np.zeros(2), foreground=lambda _: NONE) for w in (np.ones(2), None)]
    assert both[0] == both[1]
