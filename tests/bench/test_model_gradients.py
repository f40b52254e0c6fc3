"""How far float32 gradient norms are from the reference vectors, and both from the same model in float64.

pytest tests/bench/test_model_gradients.py -m bench -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hermes_dist.models.published import from_state_dict
from tests.models.conftest import vector as vector
from tests.models.test_published import NEGLIGIBLE, grad_norms


def deviations(found: dict[str, float], expected: dict[str, float]) -> list[float]:
    """Relative deviations of all norms that count."""
    return [abs(found[n] - e) / e for n, e in expected.items() if max(e, found[n]) > NEGLIGIBLE and e > 0]


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_deviations_of_gradient_norms(vector: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reference = vector.facts["grad_norms"]
    single, double = (grad_norms(from_state_dict(vector.state).to(t), vector) for t in (torch.float32, torch.float64))
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
