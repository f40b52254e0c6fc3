"""Phantoms: deterministic, and conflicting where they say so."""

from __future__ import annotations

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest

from data_tools.phantom import RECIPES, draw_case, write_phantoms


def fingerprint(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_the_seed_decides_every_byte(tmp_path):
    write_phantoms(tmp_path / "a", seed=3, cases=3)
    write_phantoms(tmp_path / "b", seed=3, cases=3)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    scans = [draw_case(RECIPES[2], np.random.default_rng([seed, 2, 0]))[0] for seed in (3, 4)]
    assert scans[0].shape != scans[1].shape or (scans[0] != scans[1]).any()
    collection = json.loads((tmp_path / "a" / "collection.json").read_text())
    assert [d["name"] for d in collection["datasets"]] == [r.name for r in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_every_class_is_there_and_the_header_says_where(recipe, tmp_path):
    image, label, grid = draw_case(recipe, np.random.default_rng(0))
    assert image.shape == label.shape == grid.shape_vox_zyx
    values = {v for vs in recipe.labels.values() for v in (vs if isinstance(vs, list) else [vs])}
    assert set(np.unique(label)) == values | {0}
    assert all((label == v).sum() > 100 for v in values)
    assert np.isfinite(image).all()


def test_liver_means_two_things(tmp_path):
    write_phantoms(tmp_path, seed=0, cases=3)
    ct = json.loads((tmp_path / "Dataset901_PhantomCT" / "dataset.json").read_text())
    t1 = json.loads((tmp_path / "Dataset902_PhantomT1" / "dataset.json").read_text())
    assert ct["labels"]["liver"] == [1, 2]
    assert t1["labels"]["liver"] == 1
    codes = {
        "".join(nib.aff2axcodes(nib.load(next((tmp_path / r.folder / "imagesTr").glob("*.nii.gz"))).affine)) for r in RECIPES
    }
    assert len(codes) == 4
