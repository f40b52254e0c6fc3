"""The block grid: every voxel is held, a box is covered by as few blocks as possible, a patch up to margin + 1 by one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.errors import CorruptShardError
from hermes_dist.shards.blocks import BlockGrid, plan_parts, read_npy

grids = st.builds(
    lambda shape, block, margin, padded: BlockGrid(shape, block, 0 if padded else min(margin, min(block) - 1), padded),
    st.tuples(*[st.integers(1, 60)] * 3),
    st.tuples(*[st.integers(4, 40)] * 3),
    st.integers(0, 30),
    st.booleans(),
)


@settings(deadline=None)
@given(grid=grids, data=st.data())
def test_a_box_is_covered_exactly(grid: BlockGrid, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in grid.shape_vox_zyx]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape_vox_zyx, strict=True)]
    volume = np.arange(np.prod(grid.shape_vox_zyx)).reshape(grid.shape_vox_zyx)
    blocks = {}
    for number, index in enumerate(grid.indices()):
        first = grid.start(index)
        block = np.full(grid.stored_shape(index), -1)
        inside = volume[tuple(slice(a, a + n) for a, n in zip(first, block.shape, strict=True))]
        block[tuple(slice(n) for n in inside.shape)] = inside
        assert block.size
        blocks[number] = block
    assert len(blocks) == grid.n_blocks
    out = np.full([b - a for a, b in zip(start, stop, strict=True)], -2)
    parts = plan_parts(grid, start, stop)
    for part in parts:
        assert part.stored_shape == blocks[part.number].shape
        out[part.target] = blocks[part.number][part.source]
    np.testing.assert_array_equal(out, volume[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])
    assert [p.number for p in parts] == sorted({p.number for p in parts})


@settings(deadline=None)
@given(grid=grids, data=st.data())
def test_a_patch_up_to_margin_plus_one_needs_one_block(grid: BlockGrid, data: st.DataObject) -> None:
    size = [min(grid.margin_vox + 1, n) for n in grid.shape_vox_zyx]
    start = [data.draw(st.integers(0, n - s)) for n, s in zip(grid.shape_vox_zyx, size, strict=True)]
    assert len(plan_parts(grid, start, [a + s for a, s in zip(start, size, strict=True)])) == 1


@settings(deadline=None)
@given(grid=grids, axis=st.integers(0, 2), data=st.data())
def test_the_cover_is_the_smallest(grid: BlockGrid, axis: int, data: st.DataObject) -> None:
    side = grid.shape_vox_zyx[axis]
    first = data.draw(st.integers(0, side - 1))
    stop = data.draw(st.integers(first + 1, side))
    found = grid.cover(axis, first, stop)
    intervals = [(i * grid.stride(axis), i * grid.stride(axis) + grid.block_vox_zyx[axis]) for i in range(grid.counts[axis])]
    reach, best = first, 0
    while reach < stop:  # the classic greedy cover: of all blocks that hold the next voxel, the one that reaches furthest
        reach = max(b for a, b in intervals if a <= reach)
        best += 1
    assert len(found) == best
    assert [p[1] for p in found[1:]] == [p[2] for p in found[:-1]]


def test_npy_members_are_checked() -> None:
    good = io.BytesIO()
    np.save(good, np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    data = memoryview(good.getvalue())
    np.testing.assert_array_equal(read_npy(data, (2, 3, 4), np.dtype("int16"), "x").reshape(-1), np.arange(24))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for bad in (data[:-1], data[:20], b"nothing at all", pickled.getvalue()):
        with pytest.raises(CorruptShardError, match="x: "):
            read_npy(memoryview(bad), (2, 3, 4), np.dtype("int16"), "x")
    with pytest.raises(CorruptShardError, match="expected"):
        read_npy(data, (2, 3, 4), np.dtype("int32"), "x")
