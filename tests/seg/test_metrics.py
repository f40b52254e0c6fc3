"""Metrics against second implementations (brute force and MONAI), the named policies, and the averages."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from hermes_dist.config import EvaluateConfig
from hermes_dist.seg import surface
from hermes_dist.seg.metrics import ClassScore, MaskScore, aggregate, score_case

NAN = float("nan")


def blobs(seed: int, shape=(18, 21, 16), level: float = 0.0) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    return field > level


spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 10_000), second=st.integers(0, 10_000), spacing=spacings, level=st.floats(-0.05, 0.1))
def test_distances_equal_brute_force(first, second, spacing, level):
    a, b = blobs(first, level=level), blobs(second, level=level)
    if not a.any() or not b.any():
        return
    points = [np.argwhere(m & ~binary_erosion(m)) * spacing for m in (a, b)]
    between = cdist(points[0], points[1])
    forth, back = between.min(1), between.min(0)
    for dense in (0.0, 2.0):
        old, surface.DENSE_SURFACE = surface.DENSE_SURFACE, dense
        got = surface.surface_distances(a, b, spacing)
        surface.DENSE_SURFACE = old
        np.testing.assert_allclose(got[0], forth, atol=1e-9)
        np.testing.assert_allclose(got[1], back, atol=1e-9)
    score = score_case(a, b, spacing, tolerance_mm=2.0)
    assert score.hd95_mm == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert score.nsd == pytest.approx(((forth <= 2).sum() + (back <= 2).sum()) / (len(forth) + len(back)))
    assert score.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
def test_agrees_with_monai(seed, spacing):
    a, b = blobs(seed), blobs(seed + 100)
    one, two = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    score = score_case(a, b, spacing, tolerance_mm=1.5)
    hd95 = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=list(spacing)).item()
    nsd = compute_surface_dice(one, two, [1.5], include_background=True, spacing=list(spacing)).item()
    assert score.hd95_mm == pytest.approx(hd95, rel=1e-5)
    assert score.nsd == pytest.approx(nsd, rel=1e-5)


def test_symmetric_and_invariant_under_flip_and_permutation():
    a, b, spacing = blobs(3), blobs(4), (2.0, 1.0, 0.5)
    score = score_case(a, b, spacing)
    assert score_case(b, a, spacing).hd95_mm == score.hd95_mm
    turned = [np.flip(m, 1).transpose(2, 0, 1) for m in (a, b)]
    again = score_case(turned[0], turned[1], (0.5, 2.0, 1.0))
    assert (again.dice, again.nsd) == (score.dice, score.nsd)
    assert again.hd95_mm == pytest.approx(score.hd95_mm)


def test_known_distance_in_mm():
    a, b = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    a[2, 5, 5], b[6, 5, 5] = True, True
    score = score_case(a, b, (2.5, 1.0, 1.0))
    assert (score.dice, score.nsd, score.hd95_mm) == (0.0, 0.0, 10.0)


def test_perfect_prediction():
    a = blobs(1)
    score = score_case(a, a, (1.0, 1.0, 1.0))
    assert (score.dice, score.nsd, score.hd95_mm) == (1.0, 1.0, 0.0)


def test_unannotated_voxels_are_left_out():
    a, valid = blobs(1), np.ones((18, 21, 16), bool)
    b = a.copy()
    b[:, :5], valid[:, :5] = False, False
    assert score_case(a, b, (1.0, 1.0, 1.0), valid=valid).dice == 1.0


EMPTY, FULL = np.zeros((4, 5, 6), bool), np.ones((4, 5, 6), bool)
WORST = math.sqrt(4**2 + 10**2 + 6**2)
POLICY_CASES = [
    ("count", EMPTY, EMPTY, (1.0, 1.0, 0.0)),
    ("count", FULL, EMPTY, (0.0, 0.0, WORST)),
    ("count", EMPTY, FULL, (0.0, 0.0, WORST)),
    ("nnunet", EMPTY, EMPTY, (NAN, NAN, NAN)),
    ("nnunet", FULL, EMPTY, (0.0, 0.0, WORST)),
    ("nnunet", EMPTY, FULL, (0.0, 0.0, WORST)),
    ("skip", EMPTY, EMPTY, (NAN, NAN, NAN)),
    ("skip", FULL, EMPTY, (NAN, NAN, NAN)),
    ("skip", EMPTY, FULL, (0.0, 0.0, WORST)),
]


@pytest.mark.parametrize(("policy", "prediction", "reference", "want"), POLICY_CASES)
def test_policies(policy, prediction, reference, want):
    score = score_case(prediction, reference, (1.0, 2.0, 1.0))
    got = tuple(score.value(m, policy) for m in ("dice", "nsd", "hd95_mm"))
    np.testing.assert_allclose(got, want)


def entry(dataset: str, case: str, name: str, dice: float, *, reference: int = 10, prediction: int = 10) -> ClassScore:
    score = MaskScore(dice, dice, 1.0 if reference and prediction else NAN, reference, prediction, 100.0)
    return ClassScore(dataset, case, name, 0, "stored", score)


def test_averages_policies_and_missed_structures():
    scores = [
        entry("a", "1", "x", 0.8),
        entry("a", "2", "x", 0.0, prediction=0),
        entry("a", "1", "y", NAN, reference=0, prediction=0),
        entry("a", "2", "y", 0.5),
        entry("b", "1", "z", 0.0, reference=0, prediction=7),
        entry("b", "2", "z", 0.9),
    ]
    result = aggregate(scores, EvaluateConfig(bootstrap=50))
    x, y, z = result["per_class"]
    assert (x["dice"], x["missed"], x["n"], x["hd95_mm"], x["hd95_found_mm"]) == (0.4, 1, 2, 50.5, 1.0)
    assert (y["dice"], y["n"], y["n_with_reference"]) == (0.75, 2, 1)
    assert (z["dice"], z["false_alarms"]) == (0.45, 1)
    assert z["dice_by_policy"] == {"count": 0.45, "nnunet": 0.45, "skip": 0.9}
    assert result["mean"]["dice"] == pytest.approx((0.4 + 0.75 + 0.45) / 3, abs=1e-6)
    assert result["mean"]["dice_by_policy"]["skip"] == pytest.approx((0.4 + 0.5 + 0.9) / 3, abs=1e-6)
    assert [d["dice"] for d in result["per_dataset"]] == [0.575, 0.45]
    assert (result["mean"]["missed"], result["mean"]["false_alarms"]) == (1, 1)
    skip = aggregate(scores, EvaluateConfig(bootstrap=50, empty_reference="skip"))
    assert [c["n"] for c in skip["per_class"]] == [2, 1, 1]
    json.dumps(result, allow_nan=False)


def test_a_class_without_any_counted_case_is_null_not_nan():
    scores = [entry("a", "1", "x", 0.8), entry("a", "1", "y", NAN, reference=0, prediction=0)]
    result = aggregate(scores, EvaluateConfig(empty_reference="nnunet"))
    assert result["per_class"][1]["dice"] is None
    assert result["per_class"][1]["dice_ci"] is None
    assert result["mean"]["dice"] == 0.8


def test_intervals_are_reproducible_cover_the_mean_and_can_be_off():
    random = np.random.default_rng(0)
    scores = [entry("a", str(i), "x", float(v)) for i, v in enumerate(random.uniform(0.5, 0.9, 60))]
    row = aggregate(scores, EvaluateConfig())["per_class"][0]
    assert row == aggregate(scores, EvaluateConfig())["per_class"][0]
    low, high = row["dice_ci"]
    assert low < row["dice"] < high
    sem = np.std([s.score.dice for s in scores]) / math.sqrt(60)
    assert high - low == pytest.approx(2 * 1.96 * sem, rel=0.15)
    assert aggregate(scores, EvaluateConfig(bootstrap=0))["per_class"][0]["dice_ci"] is None


def test_nothing_scored():
    result = aggregate([], EvaluateConfig())
    assert result["mean"]["dice"] is None
    assert result["per_class"] == []


def test_scores_survive_json():
    score = entry("a", "1", "x", NAN, reference=0, prediction=0)
    again = ClassScore.from_json(json.loads(json.dumps(score.to_json(), allow_nan=False)))
    assert again.to_json() == score.to_json()
