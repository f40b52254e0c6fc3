"""Four synthetic nnU-Net datasets whose labels are partial and conflict, for tests, the demo and offline examples.

| dataset      | modality | annotates                                  | visible, but not annotated        |
|--------------|----------|--------------------------------------------|-----------------------------------|
| phantom_ct   | CT       | liver *with* the tumour, tumour, spleen, kidneys (one class) | bone, bowel |
| phantom_t1   | T1       | liver *without* the tumour, right kidney, left kidney | spleen, tumour, bone   |
| phantom_pet  | PET      | lesion                                     | kidneys and bladder, as hot as lesions |
| phantom_cine | cineMRI  | lv_cavity, myocardium, right_ventricle     | liver dome                        |

So `liver` means two things, `kidneys` is split in one dataset and whole in another, and a hot spot is a lesion only where it is
not an organ. Anatomy, spacing, orientation, noise, bias field and intensity scale vary. Everything is a function of the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation

from data_tools.files import write_json
from data_tools.sources.nifti import write_nifti
from hermes_dist.volume.geometry import Grid, Orientation

Ellipsoids = dict[str, np.ndarray]
SPLIT_SHARES = (0.6, 0.1, 0.3)


@dataclass(frozen=True)
class Recipe:
    """One synthetic dataset: how its scans are taken, and what its annotators drew."""

    name: str
    folder: str
    modality: str
    region: str
    spacing_mm_zyx: tuple[float, float, float]
    fov_mm_zyx: tuple[float, float, float]
    orientation: Orientation
    oblique_deg: float
    labels: dict[str, int | list[int]]
    draw: Callable[[Ellipsoids, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _inside(points_mm: np.ndarray, centre: tuple[float, ...], radii: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Mask of an ellipsoid (R, A, S mm), moved and scaled a little at random."""
    where = np.array(centre) + rng.normal(0, 2.0, 3)
    size = np.array(radii) * rng.uniform(0.88, 1.12, 3)
    return (((points_mm - where) / size) ** 2).sum(axis=-1) <= 1


def _smooth_noise(shape: tuple[int, ...], rng: np.random.Generator, *, knots: int) -> np.ndarray:
    """Random field of about unit amplitude that varies over 1/knots of the volume."""
    coarse = rng.normal(size=(knots + 1,) * 3)
    return np.asarray(zoom(coarse, [n / (knots + 1) for n in shape], order=3, mode="nearest", grid_mode=True))


def abdomen(points_mm: np.ndarray, rng: np.random.Generator) -> Ellipsoids:
    """Organ masks of one body; +x right, +y anterior, +z superior."""
    masks = {"body": _inside(points_mm, (0, 0, 0), (45, 38, 70), rng)}
    masks["bone"] = (((points_mm[..., :2] - (0, -26)) / 7.5) ** 2).sum(axis=-1) <= 1
    masks["liver"] = _inside(points_mm, (17, 9, 10), (21, 20, 24), rng)
    masks["spleen"] = _inside(points_mm, (-25, -3, 14), (11, 14, 15), rng)
    masks["kidney_right"] = _inside(points_mm, (19, -19, -20), (9, 9, 15), rng)
    masks["kidney_left"] = _inside(points_mm, (-19, -19, -18), (9, 9, 15), rng)
    masks["bowel"] = _inside(points_mm, (-4, 14, -30), (20, 12, 12), rng)
    angle = rng.uniform(0, 2 * np.pi)
    offset = (17 + 6 * np.cos(angle), 9 + 6 * np.sin(angle), 10 + rng.uniform(-8, 8))
    masks["tumour"] = _inside(points_mm, offset, (rng.uniform(8, 11),) * 3, rng) & masks["liver"]
    return masks


def _paint(masks: Ellipsoids, values: dict[str, float], background: float) -> np.ndarray:
    image = np.full(masks["body"].shape, background, np.float32)
    for name, value in values.items():
        image[masks[name] & masks["body"]] = value
    return image


def _draw_ct(points_mm: Ellipsoids, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    masks = abdomen(points_mm["points"], rng)
    values = {
        "body": -110,
        "bone": 480,
        "bowel": 20,
        "spleen": 210,
        "kidney_right": 310,
        "kidney_left": 310,
        "liver": 150,
        "tumour": -10,
    }
    image = _paint(masks, {k: v + rng.normal(0, 5) for k, v in values.items()}, -1000)
    image += masks["body"] * 14 * _smooth_noise(image.shape, rng, knots=9)
    label = np.zeros(image.shape, np.uint8)
    for name, value in {"spleen": 3, "kidney_right": 4, "kidney_left": 4, "liver": 1, "tumour": 2}.items():
        label[masks[name] & masks["body"]] = value
    image = gaussian_filter(image, 0.5) + rng.normal(0, 18, image.shape)
    return np.clip(image, -1024, 1500).round().astype(np.int16), label


def _draw_t1(points_mm: Ellipsoids, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    masks = abdomen(points_mm["points"], rng)
    values = {
        "body": 240,
        "bone": 60,
        "bowel": 200,
        "spleen": 85,
        "kidney_right": 115,
        "kidney_left": 115,
        "liver": 165,
        "tumour": 50,
    }
    image = _paint(masks, {k: v * rng.uniform(0.95, 1.05) for k, v in values.items()}, 2)
    image += masks["body"] * 6 * _smooth_noise(image.shape, rng, knots=9)
    label = np.zeros(image.shape, np.uint8)
    for name, value in {"kidney_right": 2, "kidney_left": 3, "liver": 1, "tumour": 0}.items():
        label[masks[name] & masks["body"]] = value
    image = gaussian_filter(image, 0.5) * (1 + 0.12 * _smooth_noise(image.shape, rng, knots=2))
    image = np.hypot(image + rng.normal(0, 8, image.shape), rng.normal(0, 8, image.shape)) * rng.uniform(0.5, 6)
    return np.clip(image, 0, 32000).astype(np.float32), label


def _draw_pet(points_mm: Ellipsoids, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    points = points_mm["points"]
    masks = abdomen(points, rng)
    masks["bladder"] = _inside(points, (0, 8, -46), (12, 11, 9), rng)
    hot = {"kidney_right": 6.0, "kidney_left": 6.0, "bladder": 9.0}
    values = {"body": 0.7, "bone": 1.0, "bowel": 1.1, "spleen": 1.8, "liver": 2.3, **hot}
    image = _paint(masks, {k: v * rng.uniform(0.85, 1.15) for k, v in values.items()}, 0.02)
    lesion = np.zeros(image.shape, bool)
    sites = [(17.0, 12.0, 12.0), (-24.0, 2.0, 18.0), (-6.0, 18.0, -8.0)]
    for site in rng.permutation(len(sites))[: rng.integers(1, 4)]:
        one = _inside(points, sites[site], (rng.uniform(7, 11),) * 3, rng) & masks["body"]
        image[one] = rng.uniform(5, 9)
        lesion |= one
    image = gaussian_filter(image, 0.6) * (1 + 0.06 * _smooth_noise(image.shape, rng, knots=9))
    image = image + rng.normal(0, 0.12, image.shape) * np.sqrt(np.maximum(image, 0.1))
    return np.maximum(image, 0).astype(np.float32), lesion.astype(np.uint8)


def _draw_cine(points_mm: Ellipsoids, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    points = points_mm["points"]
    body = _inside(points, (0, 0, 0), (47, 47, 90), rng)
    wobble = rng.normal(0, 2.5, 3)
    thickness = rng.uniform(6.5, 8.5)
    radii = np.array([15, 15, 26]) * rng.uniform(0.9, 1.1)
    distance = points - (np.array([-7, 0, 0]) + wobble)
    outer = ((distance / (radii + thickness)) ** 2).sum(axis=-1) <= 1
    cavity = ((distance / radii) ** 2).sum(axis=-1) <= 1
    right = _inside(points, tuple(np.array([20, 3, 2]) + wobble), (16, 18, 24), rng) & ~outer
    dome = points[..., 2] < -34 + rng.normal(0, 2)
    masks = {"body": body, "dome": dome, "right": right, "outer": outer, "cavity": cavity}
    values = {"body": 60, "dome": 130, "right": 200, "outer": 95, "cavity": 205}
    image = _paint(masks, {k: v * rng.uniform(0.95, 1.05) for k, v in values.items()}, 3)
    label = np.zeros(image.shape, np.uint8)
    label[right & body], label[outer & body], label[cavity & body] = 3, 2, 1
    image += body * 8 * _smooth_noise(image.shape, rng, knots=9)
    image = gaussian_filter(image, 0.5) * (1 + 0.15 * _smooth_noise(image.shape, rng, knots=2))
    image = np.hypot(image + rng.normal(0, 9, image.shape), rng.normal(0, 9, image.shape))
    return np.clip(image * rng.uniform(0.5, 8), 0, 32000).round().astype(np.int16), label


RECIPES = (
    Recipe("phantom_ct", "Dataset901_PhantomCT", "CT", "abdomen", (2.5, 1.8, 1.8), (104, 88, 98),
           Orientation((0, 1, 2), (False, True, True)), 0, {"liver": [1, 2], "tumour": 2, "spleen": 3, "kidneys": 4}, _draw_ct),
    Recipe("phantom_t1", "Dataset902_PhantomT1", "T1", "abdomen", (2.0, 2.2, 2.0), (100, 88, 98),
           Orientation((2, 0, 1), (False, False, True)), 4, {"liver": 1, "kidney_right": 2, "kidney_left": 3}, _draw_t1),
    Recipe("phantom_pet", "Dataset903_PhantomPET", "PET", "abdomen", (2.4, 2.4, 2.4), (112, 88, 98),
           Orientation((0, 1, 2), (False, False, False)), 0, {"lesion": 1}, _draw_pet),
    Recipe("phantom_cine", "Dataset904_PhantomCine", "cineMRI", "heart", (4.0, 1.7, 1.7), (92, 92, 92),
           Orientation((0, 2, 1), (True, False, False)), 25, {"lv_cavity": 1, "myocardium": 2, "right_ventricle": 3}, _draw_cine),
)  # fmt: skip


def draw_case(recipe: Recipe, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Grid]:
    """One scan: (image Z Y X, label Z Y X uint8, grid), in the recipe's own axis order and oblique by its angle."""
    spacing = np.array(recipe.spacing_mm_zyx)
    fov = np.array(recipe.fov_mm_zyx) * rng.uniform(0.96, 1.04, 3)
    z, y, x = (int(n) for n in np.ceil(fov / spacing))
    turn = Rotation.from_euler("x", recipe.oblique_deg, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing[::-1]
    affine[:3, 3] = rng.normal(0, 30, 3)
    index = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (z, y, x)), indexing="ij"), axis=-1)
    points_mm = index[..., ::-1] * spacing[::-1]
    warp = [2.0 * _smooth_noise((z, y, x), rng, knots=4) for _ in range(3)]
    image, label = recipe.draw({"points": points_mm + np.stack(warp, axis=-1)}, rng)
    grid = Grid(affine, (z, y, x))
    scan, mask = recipe.orientation.apply(image), recipe.orientation.apply(label)
    return np.ascontiguousarray(scan), np.ascontiguousarray(mask), recipe.orientation.apply_to_grid(grid)


def write_phantoms(out: Path, *, seed: int = 0, cases: int = 20) -> Path:
    """Write the four datasets, `splits.json` and `collection.json` under `out`; return the collection's path.

    `cases` per dataset are split 60 / 10 / 30 % into train / val / test (20 → 12 / 2 / 6). The same seed writes the same bytes.
    """
    splits: dict[str, dict[str, list[str]]] = {}
    entries: list[dict[str, Any]] = []
    for index, recipe in enumerate(RECIPES):
        folder = out / recipe.folder
        ids = [f"{recipe.name}_{number:03d}" for number in range(cases)]
        for number, case_id in enumerate(ids):
            image, label, grid = draw_case(recipe, np.random.default_rng([seed, index, number]))
            slope = 0.01 if recipe.modality == "PET" else None  # SUV as it is often found: int16 with a slope
            write_nifti(folder / "imagesTr" / f"{case_id}_0000.nii.gz", image, grid, slope=slope)
            write_nifti(folder / "labelsTr" / f"{case_id}.nii.gz", label, grid)
        write_json(
            folder / "dataset.json",
            {
                "name": recipe.name,
                "channel_names": {"0": recipe.modality},
                "labels": {"background": 0, **recipe.labels},
                "numTraining": cases,
                "file_ending": ".nii.gz",
            },
        )
        splits[recipe.name] = split_ids(ids)
        entries.append(
            {
                "name": recipe.name,
                "path": recipe.folder,
                "layout": "nnunet",
                "modality": recipe.modality,
                "region": recipe.region,
                "labels": list(recipe.labels),
                "label_ids": list(recipe.labels.values()),
            }
        )
    write_json(out / "splits.json", splits)
    collection = {
        "name": "phantom",
        "version": 1,
        "description": f"Synthetic scans, seed {seed}: partial labels with conflicting definitions.",
        "preprocessing": {"spacing_mm_zyx": [2.75, 2.75, 2.75]},
        "splits": "splits.json",
        "datasets": entries,
    }
    write_json(out / "collection.json", collection)
    return out / "collection.json"


def split_ids(ids: list[str]) -> dict[str, list[str]]:
    """60 / 10 / 30 % in order (cases are independent draws, so order carries no information)."""
    train = round(SPLIT_SHARES[0] * len(ids))
    val = train + round(SPLIT_SHARES[1] * len(ids))
    return {"train": ids[:train], "val": ids[train:val], "test": ids[val:]}


def describe(collection: Path) -> str:
    """One line a dataset: what was written."""
    data = json.loads(collection.read_text())
    return "\n".join(f"  {d['name']:<14} {d['modality']:<8} {', '.join(d['labels'])}" for d in data["datasets"])
