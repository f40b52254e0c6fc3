"""The stated error bounds of stored images hold for any volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hermes_dist.errors import DataError
from hermes_dist.shards.quantise import error_bound, quantise

volumes = arrays(np.float32, (3, 4, 5), elements=st.floats(-1e6, 1e6, width=32) | st.floats(-4, 4, width=32))


@settings(deadline=None)
@given(image=volumes)
def test_int16_error_is_at_most_half_a_step(image: np.ndarray) -> None:
    stored, step = quantise(image, "int16")
    assert stored.dtype == np.int16
    largest = float(abs(image).max())
    decoded = stored * np.float32(step)
    assert decoded.dtype == np.float32
    assert abs(decoded.astype(np.float64) - image).max() <= error_bound("int16", step, largest) == step / 2
    assert step / 2 <= max(2**-11, largest / 32767)
    assert np.log2(step) == int(np.log2(step))


@settings(deadline=None)
@given(image=arrays(np.float32, (3, 4, 5), elements=st.floats(-65504, 65504, width=32)))
def test_float16_bound(image: np.ndarray) -> None:
    stored, step = quantise(image, "float16")
    assert (stored.dtype, step) == (np.float16, 1.0)
    assert (abs(stored.astype(np.float64) - image) <= np.maximum(abs(image) * 2.0**-11, 2.0**-25)).all()
    assert error_bound("float16", step, 2.0) == 2.0**-10


@settings(deadline=None)
@given(image=volumes)
def test_float32_is_exact_and_has_no_negative_zero(image: np.ndarray) -> None:
    stored, step = quantise(image, "float32")
    np.testing.assert_array_equal(stored, image)
    assert step == 1
    assert not np.signbit(stored[stored == 0]).any()


def test_a_z_scored_volume_keeps_half_a_thousandth_of_a_standard_deviation() -> None:
    image = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    stored, step = quantise(image, "int16")
    assert step == 2**-10
    assert abs(stored * np.float32(step) - image).max() <= 2**-11


@pytest.mark.parametrize(
    ("value", "dtype", "says"), [(np.nan, "int16", "NaN"), (np.inf, "float32", "NaN"), (7e4, "float16", "65504")]
)
def test_what_cannot_be_stored(value: float, dtype: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        quantise(np.full((2, 2, 2), value, np.float32), dtype)


def test_unknown_type() -> None:
    with pytest.raises(DataError, match="int8"):
        quantise(np.zeros((2, 2, 2), np.float32), "int8")
