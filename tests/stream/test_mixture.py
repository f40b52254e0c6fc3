"""Shares and their apportionment to blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hermes_dist.config import MixtureConfig
from hermes_dist.errors import ConfigError
from hermes_dist.stream.mixture import HERMES_WEIGHTS, apportion, period_of, shares, volume_weights


@pytest.mark.parametrize(
    ("alpha", "expected"), [(1.0, [0.01, 0.99]), (0.5, [1 / (1 + 99**0.5), 99**0.5 / (1 + 99**0.5)]), (0.0, [0.5, 0.5])]
)
def test_temperature(alpha: float, expected: list[float]) -> None:
    np.testing.assert_allclose(shares(["a", "b"], [1, 99], MixtureConfig(alpha=alpha)), expected)


def test_weights_replace_the_temperature_and_unnamed_datasets_get_nothing() -> None:
    np.testing.assert_allclose(shares(["a", "b", "c"], [5, 5, 5], MixtureConfig(weights={"a": 1, "c": 3})), [0.25, 0, 0.75])


def test_wrong_weights_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'livr'.*Did you mean 'liver'"):
        shares(["liver"], [1], MixtureConfig(weights={"livr": 1}))
    with pytest.raises(ConfigError, match="all 0"):
        shares(["liver"], [1], MixtureConfig(weights={"liver": 0}))
    with pytest.raises(ConfigError, match="finite"):
        shares(["liver"], [1], MixtureConfig(weights={"liver": -1}))
    with pytest.raises(ConfigError, match=r"no published weight.*'kits'"):
        shares(["kit"], [3], MixtureConfig(weights="hermes"))


def test_published_weights_of_hermes() -> None:
    volumes = {
        "amos_ct": 195, "structseg_head_oar": 39, "mnm": 286, "autopet": 705, "amos_mr": 38, "brain_structure": 124,
        "kits": 159, "bcv": 23, "lits": 99, "structseg_oar": 38, "chaos": 45,
    }  # fmt: skip
    percent = 100 * shares(list(volumes), list(volumes.values()), MixtureConfig(weights="hermes"))
    np.testing.assert_allclose(percent, [39.9, 11.5, 9.8, 8.0, 6.9, 5.6, 5.4, 3.9, 3.4, 3.0, 2.6], atol=0.06)


def test_the_recipe_of_the_paper_knows_every_published_weight() -> None:
    recipe = json.loads((Path(__file__).parents[2] / "configs/collections/hermes_upstream.json").read_text())
    names = [entry["name"] for entry in recipe["datasets"]]
    weights = volume_weights(names, [1] * len(names))
    assert set(HERMES_WEIGHTS) - {"chaos"} == set(weights)


@settings(max_examples=80, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12),
    block=st.integers(1, 300),
    period=st.integers(1, 200),
)
@example(weights=[1.0, 1.0, 1.0, 0.0078125, 0.0078125], block=7, period=25)  # where the largest remainder strays
def test_every_block_is_full_and_the_running_count_never_strays(weights: list[float], block: int, period: int) -> None:
    fractions = np.asarray(weights) / np.sum(weights)
    counts = apportion(fractions, block, period)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == block).all()
    ideal = fractions * block * np.arange(1, period + 1)[:, None]
    assert np.abs(counts.cumsum(axis=0) - ideal).max() < 1


def test_first_block_is_largest_remainder() -> None:
    assert apportion(np.array([0.47, 0.35, 0.18]), 10, 1).tolist() == [[5, 3, 2]]


def test_rare_datasets_get_their_turn() -> None:
    fractions = np.array([0.9995, 0.0005])
    period = period_of(fractions, 64)
    counts = apportion(fractions, 64, period)
    assert counts[:, 1].sum() == round(0.0005 * 64 * period)
    assert counts[:, 1].max() == 1
    with pytest.raises(ConfigError, match="less than one position"):
        period_of(np.array([1 - 1e-9, 1e-9]), 64)
