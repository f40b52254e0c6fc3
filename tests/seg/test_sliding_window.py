"""Sliding windows: against a plain implementation that holds everything at once, and for memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hermes_dist.errors import NumericalError, UsageError
from hermes_dist.seg import sliding_window as sw


def local_model(image: Tensor) -> Tensor:
    """Three tasks that look at the voxel alone: the result may not depend on the windows."""
    return torch.cat([image, -image, image * 2 - 0.5], dim=1)


def positional_model(image: Tensor) -> Tensor:
    """Two tasks that depend on the place in the window: the fusion weights show."""
    ramp = torch.linspace(-2, 2, image.shape[-1])
    return torch.cat([image + ramp, image * 0 + ramp.flip(0)], dim=1)


def plain(model, image: np.ndarray, window: sw.Vox3, overlap: float, weights: sw.Weights) -> np.ndarray:
    """Reference: pad, one full float64 accumulator, no streaming, explicit weight volume."""
    short = [max(0, w - n) for n, w in zip(image.shape, window, strict=True)]
    padded = np.pad(image, [(s // 2, s - s // 2) for s in short], constant_values=image.min())
    axes = [np.arange(n) - (n - 1) / 2 for n in window]
    one = [
        np.ones(n) if weights == "uniform" else np.maximum(np.exp(-32 * (a / n) ** 2), 0.01)
        for n, a in zip(window, axes, strict=True)
    ]
    weight = one[0][:, None, None] * one[1][:, None] * one[2]
    total, norm = None, np.zeros(padded.shape)
    for z in sw.window_starts(padded.shape[0], window[0], overlap):
        for y in sw.window_starts(padded.shape[1], window[1], overlap):
            for x in sw.window_starts(padded.shape[2], window[2], overlap):
                box = np.s_[z : z + window[0], y : y + window[1], x : x + window[2]]
                logits = model(torch.from_numpy(padded[box])[None, None])[0].double().numpy()
                total = np.zeros((len(logits), *padded.shape)) if total is None else total
                total[(slice(None), *box)] += weight / (1 + np.exp(-logits))
                norm[box] += weight
    assert total is not None
    inner = tuple(slice(s // 2, s // 2 + n) for s, n in zip(short, image.shape, strict=True))
    return (total / norm)[(slice(None), *inner)]


def together(parts) -> np.ndarray:
    parts = list(parts)
    position = 0
    for part in parts:
        assert part.start_z == position
        position += part.probability.shape[1]
    return np.concatenate([part.probability for part in parts], axis=1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 21)] * 3),
    window=st.tuples(*[st.integers(2, 9)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    weights=st.sampled_from(["gaussian", "uniform"]),
    batch=st.integers(1, 5),
    block=st.integers(1, 4),
)
def test_streaming_equals_plain(shape, window, overlap, weights, batch, block):
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = together(
        sw.slabs(positional_model, image, window=window, overlap=overlap, weights=weights, batch=batch, task_block=block)
    )
    np.testing.assert_allclose(got, plain(positional_model, image, window, overlap, weights), atol=2e-6)


@pytest.mark.parametrize("weights", ["gaussian", "uniform"])
def test_a_local_model_is_reproduced_exactly(weights):
    image = np.random.default_rng(1).standard_normal((20, 17, 9)).astype(np.float32)
    got = together(sw.slabs(local_model, image, window=(8, 8, 16), weights=weights))
    want = torch.sigmoid(local_model(torch.from_numpy(image)[None, None]))[0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(side=st.integers(1, 700), window=st.integers(1, 128), overlap=st.floats(0, 0.9))
def test_starts_cover_without_duplicates(side, window, overlap):
    starts = sw.window_starts(side, window, overlap)
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == max(0, side - window)
    stride = max(1, int(window * (1 - overlap)))
    assert all(b - a <= stride + 1 and b - a <= window for a, b in pairwise(starts))


def test_a_side_of_two_strides_is_one_window():
    """The published code runs the same window 8 times for a 128³ scan."""
    calls = []

    def count(image: Tensor) -> Tensor:
        calls.append(image.shape[0])
        return image

    list(sw.slabs(count, np.zeros((16, 16, 16), np.float32), window=(16, 16, 16)))
    assert sum(calls) == 1


def test_quantised_keeps_the_threshold_and_packed_masks_agree():
    image = np.random.default_rng(2).standard_normal((13, 11, 10)).astype(np.float32)
    run: dict = {"window": (6, 6, 6), "overlap": 0.5}
    probability = together(sw.slabs(local_model, image, **run))
    levels = sw.quantised(sw.slabs(local_model, image, **run), 13)
    packed = sw.packed_masks(sw.slabs(local_model, image, **run), 13)
    assert levels.shape == probability.shape
    assert packed.shape == (1, 13, 11, 10)
    for task in range(3):
        np.testing.assert_array_equal(levels[task] >= 128, probability[task] >= 0.5)
        np.testing.assert_array_equal(sw.unpacked(packed, task), probability[task] >= 0.5)
        assert np.abs(sw.dequantised(levels[task]) - probability[task]).max() <= 0.5 / 256 + 1e-6


def test_nan_logits_are_an_error_not_an_empty_mask():
    with pytest.raises(NumericalError, match="NaN or Inf"):
        list(sw.slabs(lambda image: image * float("nan"), np.zeros((8, 8, 8), np.float32), window=(8, 8, 8)))


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_bad_overlap(overlap):
    with pytest.raises(UsageError, match="overlap"):
        sw.window_starts(10, 4, overlap)


def test_memory_for_61_classes_stays_far_below_tasks_times_volume():
    """61 tasks over a long scan: the peak of torch's and numpy's arrays, counted by tracemalloc and by the accumulator's size."""
    import tracemalloc

    image = np.zeros((160, 24, 24), np.float32)
    full_bytes = 61 * image.size * 4
    tracemalloc.start()
    packed = sw.packed_masks(sw.slabs(lambda i: i.expand(-1, 61, -1, -1, -1), image, window=(16, 16, 16)), 160)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.nbytes * 30 < full_bytes
    assert peak < full_bytes / 4
