"""How far float32 gradient norms are from the reference vectors, and both from the same model in float64.

pytest tests/bench/test_model_gradients.py -m bench -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from hermes_dist.models.published import from_state_dict, rename
from hermes_dist.seg.losses import pair_losses
from tests.models.conftest import vector as vector

NEGLIGIBLE = 2e-6
"""Norms that are zero in exact arithmetic."""


def grad_norms(vector: Any, dtype: torch.dtype) -> dict[str, float]:
    """Norm per published parameter, of the reference's total loss."""
    model = from_state_dict(vector.state).to(dtype)
    output = model(vector.image.to(dtype), vector.task_ids, vector.modality_ids)
    heads = [h for h in (output.mask_logits, output.aux_logits) if h is not None]
    valid = vector.task_ids >= 0
    total = 0.01 * functional.cross_entropy(output.modality_logits, vector.modality_ids)
    for logits in heads:
        bce, tversky = pair_losses(logits, vector.labels, overlap="tversky")
        total = total + (bce[valid].mean() + tversky[valid].mean()) / len(heads)
    total.backward()
    own, norms = dict(model.named_parameters()), dict[str, float]()
    for published, mine in rename(vector.state).items():
        parts = [own[mine].grad, own[f"{mine.removesuffix('.task')}.null"].grad if mine.endswith(".task") else None]
        norms[published] = float(torch.cat([p.flatten() for p in parts if p is not None]).norm())
    return norms


def deviations(found: dict[str, float], expected: dict[str, float]) -> list[float]:
    """Relative deviations of all norms that count."""
    return [abs(found[n] - e) / e for n, e in expected.items() if max(e, found[n]) > NEGLIGIBLE and e > 0]


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_deviations_of_gradient_norms(vector: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reference, single, double = vector.facts["grad_norms"], grad_norms(vector, torch.float32), grad_norms(vector, torch.float64)
    pairs = {
        "ours to reference": (single, reference),
        "reference to float64": (reference, double),
        "ours to float64": (single, double),
    }
    with capsys.disabled():
        print(f"\n{vector.facts['model']}:")
        for name, (found, expected) in pairs.items():
            all_of_them = deviations(found, expected)
            print(
                f"  {name}: worst {max(all_of_them):.1e}, {sum(d > 1e-3 for d in all_of_them)} of {len(all_of_them)} above 1e-3"
            )
    assert max(deviations(single, reference)) < 1e-2
