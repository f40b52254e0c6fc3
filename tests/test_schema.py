from __future__ import annotations

import json
from pathlib import Path

import pytest

from hermes_dist.config import Config, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
REGENERATE = "make schema"


def test_the_exported_schema_is_that_of_the_code():
    exported = json.loads((CONFIGS / "schema.json").read_text())
    assert exported == Config.model_json_schema(), f"configs/schema.json is old; run: {REGENERATE}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")) + sorted(CONFIGS.glob("ablations/*.json")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    if path.name != "schema.json":
        assert load_config(path).model.priors.padding in ("masked", "attended")


def test_large_is_the_hermes_large_of_the_paper():
    config = load_config(CONFIGS / "large.json")
    assert (config.model.base_channels, config.model.blocks) == (48, (4, 4, 4, 4))
    assert (config.data.patch_vox_zyx, config.train.global_batch) == ((128, 128, 128), 16)
    assert (config.optimizer.name, config.optimizer.lr) == ("lamb", 2e-3)
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert config.train.activation_checkpointing != "none"
