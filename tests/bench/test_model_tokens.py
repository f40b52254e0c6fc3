"""How parallel the first prototypes of a dataset's tasks are, by the size of the initial task tokens.

pytest tests/bench/test_model_tokens.py -m bench -s
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hermes_dist.config import ModelConfig
from hermes_dist.models import build_model
from hermes_dist.tasks import TaskTable

TASKS = TaskTable.build([(d, m, "", [(f"c{i}", [i + 1]) for i in range(4)], None) for d, m in (("a", "CT"), ("b", "T1"))])
SEEDS = 10


def mean_cosine(init_scale: float, seed: int) -> float:
    """Mean cosine between the prototypes of four tasks of one dataset, before any training, on a patch of noise."""
    torch.manual_seed(seed)
    config = {"base_channels": 8, "blocks": [1, 1, 1, 1], "priors": {"init_scale": init_scale}}
    model = build_model(ModelConfig.model_validate(config), TASKS)
    seen: list[Tensor] = []
    model.head.fc4.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(torch.randn(1, 1, 32, 32, 32), torch.arange(4)[None], torch.tensor([0]))
    unit = functional.normalize(seen[0], dim=-1)
    return float((unit @ unit.T)[~torch.eye(4, dtype=torch.bool)].mean())


@pytest.mark.bench
def test_larger_tokens_part_the_prototypes(capsys: pytest.CaptureFixture[str]) -> None:
    cosines = {scale: sum(mean_cosine(scale, seed) for seed in range(SEEDS)) / SEEDS for scale in (1.0, 3.0, 6.0, 12.0)}
    with capsys.disabled():
        print("\n" + "\n".join(f"init_scale {scale:g}: mean cosine {value:.2f}" for scale, value in cosines.items()))
    assert cosines[6.0] < cosines[1.0] - 0.1
