"""Structure, sizes, ablations, batch independence and error messages of the models."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hermes_dist.config import Config, ModelConfig, load_config, validate
from hermes_dist.errors import ConfigError, ModelError
from hermes_dist.models import build_model
from hermes_dist.models.hermes import decoder_blocks
from hermes_dist.models.medformer import MapGeneration, PatchMerging, TransformerBlock
from hermes_dist.models.resunet import ResidualBlock, ResUNet
from hermes_dist.tasks import TaskTable

ROOT = Path(__file__).resolve().parents[2]
TASKS = TaskTable.build(
    [
        ("abdomen", "CT", "abdomen", [("liver", [1]), ("spleen", [2]), ("kidney", [3])], None),
        ("brain", "T1", "brain", [("grey", [1]), ("white", [2])], None),
    ]
)
SHAPE = (16, 32, 16)


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"base_channels": 8, "priors": {"padding": "masked"}, **changes})


def build(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(model_config(**changes), TASKS)


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def wide_images(n: int) -> Tensor:
    """32³: eight voxels at the bottleneck. With two (SHAPE), an instance norm turns rounding into differences of order one."""
    return torch.randn(n, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("base", "blocks", "parameters"),
    [
        (16, (2, 2, 2, 2), 10_140_336),
        (32, (2, 2, 2, 2), 40_560_480),
        (48, (2, 2, 2, 2), 91_260_432),
        (64, (2, 2, 2, 2), 162_240_192),
        (48, (4, 4, 4, 4), 157_947_408),
    ],
)
def test_backbone_sizes_are_the_papers(base: int, blocks: tuple[int, int, int, int], parameters: int) -> None:
    with torch.device("meta"):
        assert count(ResUNet(base, blocks, decoder_blocks(blocks), None)) == parameters


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"base_channels": 8}, 3_806_790),
        ({"base_channels": 16}, 15_277_830),
        ({"base_channels": 32}, 60_884_998),
        ({"base_channels": 48}, 136_821_510),
        ({"backbone": "medformer", "base_channels": 32}, 47_129_990),
    ],
)
def test_published_sizes(changes: dict[str, Any], parameters: int) -> None:
    table = TaskTable.build(
        [(f"d{m}", f"m{m}", "", [(f"c{i}", [i]) for i in range(12)], None) for m in range(6)]
    )  # 72 tasks and the null token, 6 modalities
    config = ModelConfig.model_validate({"priors": {"padding": "attended"}, **changes})
    with torch.device("meta"):
        assert count(build_model(config, table)) == parameters


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_presets_have_the_papers_backbones(name: str) -> None:
    sizes = {"small": 10_140_336, "base": 40_560_480, "large": 157_947_408}
    config = load_config(ROOT / "configs" / f"{name}.json").model
    with torch.device("meta"):
        assert count(ResUNet(config.base_channels, config.blocks, decoder_blocks(config.blocks), None)) == sizes[name]


def test_parameters_have_no_buffers_and_are_contiguous() -> None:
    for backbone in ("resunet", "medformer"):
        model = build(backbone=backbone)
        assert not list(model.buffers())
        assert all(p.is_contiguous() for p in model.parameters())


ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.json"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_every_ablation_of_table_4_trains(path: Path) -> None:
    changes = json.loads(path.read_text())["model"]
    config = validate({"model": {**changes, "base_channels": 8, "priors": {**changes.get("priors", {}), "padding": "masked"}}})
    torch.manual_seed(0)
    model = build_model(config.model, TASKS)
    output = model(images(2), torch.tensor([[0, 2], [3, -1]]), torch.tensor([0, 1]))
    loss = output.mask_logits.square().mean()
    if output.modality_logits is not None:
        loss = loss + output.modality_logits.square().mean()
    loss.backward()
    hermes = config.model.method == "hermes"
    assert (output.modality_logits is not None) == (hermes and config.model.priors.modality)
    assert all(p.grad is not None for p in model.parameters()), "a parameter without gradient would stop DDP"


@pytest.mark.parametrize("backbone", ["resunet", "medformer"])
def test_unidirectional_features_ignore_the_priors(backbone: str) -> None:
    model = build(backbone=backbone, priors={"padding": "masked", "direction": "unidirectional"})
    tokens = {p: torch.randn(1, 5, c) for p, c in model.backbone.place_channels.items()}
    with torch.no_grad():
        one, other = model.backbone(images(1), tokens), model.backbone(images(1), {p: -t for p, t in tokens.items()})
    torch.testing.assert_close(one.features, other.features)
    assert not torch.allclose(one.posteriors["dec4"], other.posteriors["dec4"])


@pytest.mark.parametrize("backbone", ["resunet", "medformer"])
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_a_samples_logits_depend_on_that_sample_alone(backbone: str, data: st.DataObject) -> None:
    """Alone, in any batch, in any order, with any number of padding columns (invariant 4)."""
    model = copy.deepcopy(_cached(backbone)).double()
    ids = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
    other = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
    padding, place = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1))
    width = max(len(ids), len(other)) + padding
    rows = [ids + [-1] * (width - len(ids)), other + [-1] * (width - len(other))]
    both = wide_images(2).double()
    order = [0, 1] if place == 0 else [1, 0]
    with torch.no_grad():
        alone = model(both[:1], torch.tensor([ids]), torch.tensor([0]))
        batch = model(both[order], torch.tensor(rows)[order], torch.tensor([0, 1])[order])
    torch.testing.assert_close(batch.mask_logits[place, : len(ids)], alone.mask_logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.modality_logits[place], alone.modality_logits[0], atol=1e-5, rtol=1e-5)


_MODELS: dict[str, nn.Module] = {}


def _cached(backbone: str) -> nn.Module:
    if backbone not in _MODELS:
        _MODELS[backbone] = build(backbone=backbone)
    return _MODELS[backbone]


def test_masked_logits_do_not_depend_on_padding_but_attended_ones_do() -> None:
    image, modality = wide_images(1), torch.tensor([0])
    for padding, differs in (("masked", False), ("attended", True)):
        model = build(priors={"padding": padding})
        with torch.no_grad():
            few, many = (model(image, torch.tensor([[1] + [-1] * n]), modality).mask_logits[:, :1] for n in (1, 5))
        assert (not torch.allclose(few, many, atol=1e-4)) == differs


@pytest.mark.parametrize("backbone", ["resunet", "medformer"])
@pytest.mark.parametrize("ids", [[[0, 1], [3, 4]], [[0, 1], [3, -1]]])
def test_fused_attention_equals_the_reference(backbone: str, ids: list[list[int]]) -> None:
    fused, plain = build(backbone=backbone).double(), build(backbone=backbone, attention="reference").double()
    grads = []
    for model in (fused, plain):
        output = model(wide_images(2).double(), torch.tensor(ids), torch.tensor([0, 1]))
        output.mask_logits[0].square().mean().backward()
        grads.append((output.mask_logits.detach(), model.pools["enc4"].task.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("backbone", ["resunet", "medformer", "nnunet"])
def test_traditional_computes_the_asked_channels_only(backbone: str) -> None:
    model = build(backbone=backbone, method="traditional")
    with torch.no_grad():
        every = model(images(1), torch.arange(5)[None], torch.tensor([0])).mask_logits
        some = model(images(1), torch.tensor([[4, -1, 0]]), torch.tensor([7])).mask_logits
    torch.testing.assert_close(some[:, [0, 2]], every[:, [4, 0]])


@pytest.mark.slow
def test_traditional_swinunetr_trains() -> None:
    model = build(backbone="swinunetr", method="traditional")
    image = torch.randn(1, 1, 32, 64, 32)
    model(image, torch.tensor([[0, 1]]), torch.tensor([0])).mask_logits.mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_initialisation_follows_the_published_bounds() -> None:
    table = TaskTable.build([(f"d{m}", f"m{m}", "", [(f"c{i}", [i]) for i in range(12)], None) for m in range(6)])
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({"base_channels": 8, "priors": {"padding": "attended"}}), table)
    state: dict[str, Tensor] = model.state_dict()
    bounds = {
        "pools.enc8.task": math.sqrt(6 / (73 + 64)),
        "pools.enc8.modality": math.sqrt(6 / (16 * 64)),
        "head.fc1.weight": math.sqrt(6 / (2 * 34 * 8)),
        "head.fc2.weight": math.sqrt(6 / (34 * 8 + 8)),
        "modality_head.fc1.weight": 1 / math.sqrt(34 * 8),
        "backbone.stem.conv.weight": 1 / math.sqrt(27),
        "backbone.down.0.blocks.0.conv1": 1 / math.sqrt(8 * 27),
        "backbone.up.3.blocks.0.shortcut": 1 / math.sqrt(24 * 27),
        "backbone.fusion.enc16.blocks.3.features_mlp.fc2.weight": 1 / math.sqrt(4 * 80),
    }
    for name, bound in bounds.items():
        largest = state[name].abs().max().item()
        assert 0.93 * bound < largest <= bound, name
    assert not state["head.fc1.bias"].any()
    assert not state["head.fc4.bias"].any()
    assert state["modality_head.fc1.bias"].any()
    config = ModelConfig.model_validate({"base_channels": 8, "priors": {"padding": "attended", "init_scale": 6}})
    tokens: dict[str, Tensor] = build_model(config, table).state_dict()
    for name, factor in (("task", 6), ("null", 6), ("modality", 1)):
        bound = factor * bounds[f"pools.enc8.{'modality' if name == 'modality' else 'task'}"]
        assert 0.9 * bound < tokens[f"pools.enc8.{name}"].abs().max().item() <= bound, name


@pytest.mark.parametrize(
    ("ids", "modality", "message"),
    [
        ([[0, 5]], 0, r"task_ids\[0\] = \[0, 5\]: 5 is not a task of this model; expected 0 to 4"),
        ([[-2]], 0, "-2 is not a task"),
        ([[0]], 2, r"modality_ids\[0\] = 2 is not a modality of this model; expected 0 to 1"),
        ([[0]], -1, "expected 0 to 1"),
    ],
)
def test_ids_out_of_range_are_named(ids: list[list[int]], modality: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _cached("resunet")(images(1), torch.tensor(ids), torch.tensor([modality]))


def test_no_column_is_an_error() -> None:
    with pytest.raises(ModelError, match="at least one task"):
        _cached("resunet")(images(1), torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize(
    ("backbone", "sides"),
    [("resunet", (16, 16, 16)), ("resunet", (8, 64, 64)), ("medformer", (24, 32, 32)), ("medformer", (16, 16, 16))],
)
def test_sides_too_small_are_named(backbone: str, sides: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match=rf"image sides \({sides[0]}, {sides[1]}, {sides[2]}\)"):
        _cached(backbone)(torch.zeros(1, 1, *sides), torch.tensor([[0]]), torch.tensor([0]))


@pytest.mark.parametrize("sides", [(24, 40, 32), (20, 33, 17)])
def test_resunet_takes_sides_that_do_not_halve(sides: tuple[int, int, int]) -> None:
    with torch.no_grad():
        output = _cached("resunet")(torch.randn(1, 1, *sides), torch.tensor([[0, 1]]), torch.tensor([0]))
    assert output.mask_logits.shape == (1, 2, *sides)
    assert output.mask_logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 12}, "multiple of 8"),
        ({"backbone": "nnunet"}, "has no prior fusion"),
        ({"priors": {"scales": []}}, "scales is empty"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize(("backbone", "method"), list(itertools.product(["resunet", "medformer"], ["hermes", "traditional"])))
def test_bf16_autocast_trains_near_float32(backbone: str, method: str) -> None:
    model = build(backbone=backbone, method=method)
    args = wide_images(1), torch.tensor([[0, 1]]), torch.tensor([0])
    with torch.no_grad():
        exact = model(*args).mask_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*args)
        loss = output.mask_logits.float().square().mean()
    loss.backward()
    # The deep MedFormer, untrained, multiplies bf16's rounding: its parts are compared one by one, below.
    if backbone == "resunet":
        assert (output.mask_logits.float() - exact).norm() < 0.2 * exact.norm()
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", [TransformerBlock, ResidualBlock, PatchMerging, MapGeneration])
def test_each_part_of_medformer_is_near_float32_under_bf16(kind: type[nn.Module]) -> None:
    """On the inputs that it really gets."""
    model, calls = build(backbone="medformer"), list[tuple[nn.Module, tuple[Any, ...], Any]]()
    parts = [m for m in model.modules() if isinstance(m, kind)]
    handles = [m.register_forward_hook(lambda module, args, out: calls.append((module, args, out))) for m in parts]
    with torch.no_grad():
        model(wide_images(1), torch.tensor([[0, 1]]), torch.tensor([0]))
        for handle in handles:
            handle.remove()
        assert len(calls) == len(parts) > 0
        for module, args, exact in calls:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = module(*args)
            for f, e in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, exact)), strict=True):
                assert (f.float() - e).norm() < 0.05 * e.norm()


def test_configuration_of_the_whole_run_builds() -> None:
    config = validate({"model": {"base_channels": 8}})
    assert isinstance(config, Config)
    assert isinstance(build_model(config.model, TASKS), nn.Module)
