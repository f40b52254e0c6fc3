"""Prediction on raw scans: invariance under flips and permutations, the scan's own grid, which tasks are meant, bad runs."""

from __future__ import annotations

import json
from itertools import permutations, product

import numpy as np
import pytest
import torch

from hermes_dist.errors import CheckpointError, ConfigError, DataError, TaskError
from hermes_dist.tasks import TaskTable
from hermes_dist.train import predict
from hermes_dist.volume.geometry import Grid, Orientation
from tests.train.tiny_run import TASKS, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return predict.load_run(make_run(tmp_path_factory.mktemp("predict")), torch.device("cpu"))


def scan(shape=(22, 30, 26)) -> tuple[np.ndarray, Grid]:
    """A smooth body with noise in HU, spacing 2 × 1.25 × 1.5 mm, LPS, a little oblique."""
    random = np.random.default_rng(3)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    image = np.where(z**2 + y**2 + x**2 < 0.9, 60 + 80 * np.sin(5 * x + 3 * z), -1000) + random.normal(0, 20, shape)
    affine = np.diag([-1.5, -1.25, 2.0, 1.0])
    angle = 0.1
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine
    affine[:3, 3] = [40, -12, 7]
    return image.astype(np.float32), Grid(affine, shape)


def masks(run, image, grid, names=("all",)) -> dict[str, np.ndarray]:
    targets = predict.resolve_targets(run.tasks, list(names), "CT")
    return {m.target.name: m.mask_zyx for m in predict.predict_scan(run, image, grid, modality="CT", targets=targets)}


TURNS = [Orientation(axes, flips) for axes, flips in product(permutations(range(3)), [(False, True, False), (True, False, True)])]


@pytest.mark.parametrize("turn", TURNS[::3], ids=str)
def test_a_turned_scan_gives_the_turned_mask(run, turn):
    """Invariant 6, with a real network (random weights): bit-identical masks, turned."""
    image, grid = scan()
    plain = masks(run, image, grid)
    turned = masks(run, np.ascontiguousarray(turn.apply(image)), turn.apply_to_grid(grid))
    assert plain.keys() == turned.keys()
    assert any(m.any() and not m.all() for m in plain.values())
    for name, mask in plain.items():
        np.testing.assert_array_equal(turned[name], turn.apply(mask))


def test_masks_lie_on_the_scans_own_grid(run):
    image, grid = scan((17, 40, 23))
    for mask in masks(run, image, grid).values():
        assert mask.shape == image.shape
        assert mask.dtype == bool


def test_a_mask_does_not_depend_on_what_else_is_asked(run):
    image, grid = scan()
    both = masks(run, image, grid, ["liver", "tumour"])
    np.testing.assert_array_equal(masks(run, image, grid, ["tumour"])["organs/tumour"], both["organs/tumour"])


def test_restoring_thresholds_exactly_where_spacing_was_kept(run):
    """A scan at the stored spacing: the restored mask is the stored mask, flipped back."""
    image, _ = scan()
    grid = Grid(np.diag([-1.5, 1.5, 1.5, 1.0]), image.shape)
    prepared, placement, _ = predict.preprocess_image(image, grid, "CT", run.preprocessing)
    levels = np.random.default_rng(0).integers(0, 256, prepared.shape).astype(np.uint8)
    full = predict.restored_mask(levels, placement)
    inside = placement.orientation.apply(full)[placement.crop_slices]
    np.testing.assert_array_equal(inside, levels >= 128)
    assert full.sum() == inside.sum()
    assert not predict.restored_mask(levels // 4, placement).any()


def test_which_tasks_are_meant():
    names = lambda asked, modality: [t.name for t in predict.resolve_targets(TASKS, asked, modality)]  # noqa: E731
    assert names(["liver"], "CT") == ["organs/liver"]
    assert names(["liver"], "T1") == ["brains/liver"]
    assert names(["brains/liver", "liver"], "CT") == ["brains/liver", "organs/liver"]
    assert names(["all"], "T1") == ["brains/stem", "brains/liver"]
    assert names(["tumour", "organs/tumour"], "CT") == ["organs/tumour"]


@pytest.mark.parametrize(
    ("asked", "modality", "message"),
    [
        (["livre"], "CT", "'livre' is not known.*Did you mean 'liver'"),
        (["liver"], "CTA", "modality 'CTA' was not trained.*CT, T1.*Did you mean 'CT'"),
        (["stem"], "CT", r"not trained for modality CT, only as brains/stem \(T1\)"),
        ([], "CT", "no task to predict"),
    ],
)
def test_unknown_tasks_and_modalities(asked, modality, message):
    with pytest.raises(TaskError, match=message):
        predict.resolve_targets(TASKS, asked, modality)


def test_bad_runs(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="does not exist. Did you mean"):
        predict.load_run(tmp_path / "runn")
    other = TaskTable.build([("organs", "CT", "abdomen", [("liver", [1]), ("spleen", [2]), ("aorta", [3])], None)])
    (run / "tasks.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CheckpointError, match=r"weights do not fit .* size mismatch for pools\.enc4\.task: .* \(and \d+ more\)$"):
        predict.load_run(run)
    prepared = (run / "preprocessing.json").read_text()
    (run / "preprocessing.json").unlink()
    with pytest.raises(ConfigError, match="preprocessing.json does not exist"):
        predict.load_run(run)
    (run / "preprocessing.json").write_text(prepared)
    (run / "tasks.json").unlink()
    with pytest.raises(ConfigError, match="tasks.json does not exist"):
        predict.load_run(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a readable JSON"):
        predict.load_run(run)


def test_digest_names_the_weights():
    weights = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert predict.digest(weights) == predict.digest({k: v.clone() for k, v in reversed(weights.items())})
    assert predict.digest(weights) != predict.digest({**weights, "a": torch.tensor([1.0, 1.0, 1.5])})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda image: np.put(image, [5, 9000], [np.nan, np.inf]), r"^2 of 17,160 voxels are NaN or infinite"),
        (
            lambda image: np.add(image, 3000, out=image),
            r"constant after clipping to \[-990, 500\] as CT \(values from [\d.]+ to [\d.]+\)",
        ),
        (lambda image: image.fill(7), r"constant after clipping .* \(values from 7 to 7\)"),
    ],
)
def test_scans_without_an_answer_are_refused(run, break_it, message):
    """Their masks would be empty, with nothing to tell them from those of a scan without the structure."""
    image, grid = scan()
    break_it(image)
    with pytest.raises(DataError, match=message):
        masks(run, image, grid)


@pytest.mark.parametrize(
    ("spacing_mm", "message"),
    [
        ((0.0015, 0.0015, 0.005), "spacing 0.005 × 0.0015 × 0.0015 mm is impossible"),
        ((99, 99, 99), r"resampling would make \d+ × \d+ × \d+ voxels of a scan with spacing 99 × 99 × 99 mm"),
    ],
)
def test_a_wrong_spacing_is_refused_before_it_takes_all_memory(run, monkeypatch, spacing_mm, message):
    def reached(*_):
        raise AssertionError("resampling was begun")

    monkeypatch.setattr(predict, "preprocess_image", reached)
    image = np.zeros((40, 40, 40), np.int16)
    with pytest.raises(DataError, match=message):
        masks(run, image, Grid(np.diag([*spacing_mm, 1.0]), image.shape))
