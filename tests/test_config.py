from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from hermes_dist import config as config_module
from hermes_dist.config import Config, find_config, load_config, resolve
from hermes_dist.errors import ConfigError


def write(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    return path


def test_overrides_take_json_or_text_and_create_sections(tmp_path):
    overrides = ["data.patch_vox_zyx=[32,32,48]", "run.name=trial", "deepspeed.zero_optimization.stage=3"]
    config = load_config(write(tmp_path, {}), overrides)
    assert config.data.patch_vox_zyx == (32, 32, 48)
    assert config.run.name == "trial"
    assert config.deepspeed["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"global_batc": 3}}, "unknown key 'train.global_batc'. Did you mean 'global_batch'"),
        ({"trian": {}}, "unknown key 'trian'. Did you mean 'train'"),
        ({"train": {"max_steps": "many"}}, "train.max_steps = 'many'"),
        ({"model": {"priors": {"lenght": 3}}}, "Did you mean 'length'"),
        (
            {"stream": {"cache_mib": 64}},
            "stream.cache_dir = None: a cache needs stream.cache_dir, its folder, and stream.cache_mib",
        ),
        ({"stream": {"cache_dir": "cache"}}, "stream.cache_dir = 'cache': a cache needs"),
        ({"data": {"patch_vox_zyx": [64, 0, 64]}}, r"data.patch_vox_zyx.1 = 0: input should be greater than 0"),
        ({"evaluate": {"window_vox_zyx": [64, -1, 64]}}, r"evaluate.window_vox_zyx.1 = -1"),
        ({"augment": {"rotation_deg": -1}}, "augment.rotation_deg = -1"),
        ({"augment": {"shear": 1.5}}, "augment.shear = 1.5"),
        ({"augment": {"brightness": -0.1}}, "augment.brightness = -0.1"),
        ({"augment": {"brightness_add_std": -0.1}}, "augment.brightness_add_std = -0.1"),
        ({"augment": {"gamma": [0, 1]}}, "augment.gamma.0 = 0: input should be greater than 0"),
        ({"augment": {"contrast": 1.5}}, "augment.contrast = 1.5"),
        ({"augment": {"blur_sigma_vox": [-0.5, 1]}}, "augment.blur_sigma_vox.0 = -0.5"),
        ({"augment": {"noise_std": float("inf")}}, "augment.noise_std = inf"),
        ({"run": {"name": ""}}, "run.name = ''"),
        ({"model": {"blocks": [0, 1, 1, 1]}}, "model.blocks.0 = 0"),
        ({"loss": {"modality_weight": -0.1}}, "loss.modality_weight = -0.1"),
        ({"optimizer": {"betas": [1.0, 0.9]}}, r"optimizer.betas.0 = 1.0"),
        ({"optimizer": {"eps": 0}}, "optimizer.eps = 0"),
        ({"optimizer": {"weight_decay": -1e-5}}, "optimizer.weight_decay = -1e-05"),
        ({"checkpoint": {"keep_every_hours": 0}}, "checkpoint.keep_every_hours = 0"),
        ({"evaluate": {"max_cases": 0}}, "evaluate.max_cases = 0"),
        ({"evaluate": {"max_cases": -1}}, "evaluate.max_cases = -1"),
        ({"data": {"stores": "stores/a"}}, r"data.stores = 'stores/a': expected a JSON list, .*'data.stores=\["),
        ([], "c.json: holds a list; expected an object of sections"),
    ],
)
def test_wrong_keys_and_values_are_named(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, data))
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="c.json: not a readable JSON file"):
        load_config(tmp_path / "c.json")


def test_readings_fill_only_what_was_left_open(tmp_path):
    paper = load_config(write(tmp_path, {}))
    published = load_config(write(tmp_path, {"model": {"reading": "published"}, "loss": {"modality_weight": 0.5}}))
    assert (paper.loss.overlap, paper.loss.modality_weight, paper.model.priors.padding) == ("dice", 0.001, "masked")
    assert (published.loss.overlap, published.loss.modality_weight) == ("tversky", 0.5)
    assert published.optimizer.schedule == "polynomial"


def test_resolved_config_round_trips_through_json():
    config = resolve(Config())
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_missing_config_names_both_places(tmp_path):
    (tmp_path / "large.json").write_text("{}")
    assert find_config("large.json", tmp_path) == tmp_path / "large.json"
    with pytest.raises(ConfigError, match="Did you mean 'large.json'"):
        find_config("larg.json", tmp_path)


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", name


def test_every_setting_has_a_reader() -> None:
    """A setting that no code reads would be ignored in silence. (The config room itself applies the preset `model.reading`.)"""
    own = Path(config_module.__file__).parent
    root = own.parent
    files = [*root.rglob("*.py"), *(root.parent / "launch").glob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files if own not in file.parents]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [dotted for dotted, name in _fields(Config) if name not in read] == ["model.reading"]
