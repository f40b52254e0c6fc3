"""The rule by which the reference vectors' weights and inputs are made (their README)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def rnd(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform (-1, 1) float64 numbers of one Philox stream."""
    key = np.array([seed, stream], dtype=np.uint64)
    return (np.random.Generator(np.random.Philox(key=key)).random(int(np.prod(shape))) * 2 - 1).reshape(shape)


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Every parameter of a published state dict, by the rule."""
    state = {}
    for k, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        u = rnd(seed, k, shape)
        if "prior" in name.rsplit(".", 1)[-1] and len(shape) >= 2:
            value = u
        elif len(shape) >= 2:
            value = u * np.sqrt(3 / np.prod(shape[1:]))
        else:
            value = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


@dataclass(frozen=True)
class Vector:
    """One reference vector: weights, inputs, and what the published code made of them."""

    state: dict[str, Tensor]
    image: Tensor
    task_ids: Tensor
    modality_ids: Tensor
    labels: Tensor
    facts: dict[str, Any]
    arrays: dict[str, Tensor]


@pytest.fixture(params=["hermes_r_b16", "hermes_m"])
def vector(request: pytest.FixtureRequest, reference_vectors: Path) -> Vector:
    """Each reference vector in turn."""
    facts = json.loads((reference_vectors / f"{request.param}.json").read_text())
    with np.load(reference_vectors / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    shape, ids = tuple(facts["input_shape"]), torch.tensor(facts["task_ids"])
    image = torch.from_numpy(rnd(facts["seed"], 1_000_000, shape).astype(np.float32))
    labels = torch.from_numpy(rnd(facts["seed"], 1_000_001, (*ids.shape, *shape[2:])) > 0.4)
    labels = labels * (ids >= 0)[..., None, None, None]
    state = weights(facts["state_dict"], facts["seed"])
    return Vector(state, image, ids, torch.tensor(facts["modality_ids"]), labels, facts, arrays)
