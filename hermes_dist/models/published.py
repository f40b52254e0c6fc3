"""Weights of the released checkpoints: from published names to a ready model (facts 2.2 to 2.4).

What a checkpoint says about the architecture is read from it: widths, block counts, prior counts, token length. One thing
differs from the published layout: the null token, last row of the published task tables, is a tensor of its own here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hermes_dist.errors import ModelError
from hermes_dist.models.hermes import Hermes
from hermes_dist.models.medformer import MedFormer
from hermes_dist.models.priors import PLACES, PriorPool
from hermes_dist.models.resunet import Fusion, ResUNet

_RESUNET_PLACES: dict[str, str] = {
    f"prior_{'init_fuse' if number < 5 else 'fuse'}_{number}": place for number, place in zip(range(2, 7), PLACES, strict=True)
}
_ATTENTION = {"prior_aggregate_block": "tokens_read", "feat_aggregate_block": "features_read"}
_MLP = {"prior_ffn": "tokens_mlp", "feat_ffn": "features_mlp"}
_NORM = {"norm1": "norm_q", "norm2": "norm_kv"}
_HEAD = {"out": "head", "out_classifier": "head", "aux_classifier": "aux_head"}
_HEAD_LINEAR = {"0.fc1": "fc1", "0.fc2": "fc2", "1.fc1": "fc3", "1.fc2": "fc4"}
_KERNEL = r"(conv1|conv2|shortcut)\.conv\.weight"

Rule = tuple[str, Callable[[re.Match[str]], str]]


def _side(name: str) -> str:
    """`down3` -> `down.2`."""
    return f"{name[:-1]}.{int(name[-1]) - 1}"


_HEAD_RULES: list[Rule] = [
    (r"(out|out_classifier|aux_classifier)\.norm\.(\w+)", lambda m: f"{_HEAD[m[1]]}.norm.{m[2]}"),
    (
        r"(out|out_classifier|aux_classifier)\.classifier_pred\.(\d\.fc\d)\.(\w+)",
        lambda m: f"{_HEAD[m[1]]}.{_HEAD_LINEAR[m[2]]}.{m[3]}",
    ),
    (r"mod_out\.(?:classifier\.)?(norm|fc1|fc2)\.(\w+)", lambda m: f"modality_head.{m[1]}.{m[2]}"),
    (r"inc\.conv1\.weight", lambda _: "backbone.stem.conv.weight"),
    (rf"inc\.conv2\.{_KERNEL}", lambda m: f"backbone.stem.block.{m[1]}"),
]
_RESUNET_RULES: list[Rule] = [
    *_HEAD_RULES,
    (rf"(down\d)\.conv\.(\d+)\.{_KERNEL}", lambda m: f"backbone.{_side(m[1])}.blocks.{int(m[2]) - 1}.{m[3]}"),
    (rf"(up\d)\.conv\.(\d+)\.{_KERNEL}", lambda m: f"backbone.{_side(m[1])}.blocks.{m[2]}.{m[3]}"),
    (r"(prior_\w+_\d)\.(task|modality)_prior", lambda m: f"pools.{_RESUNET_PLACES[m[1]]}.{m[2]}"),
    (
        r"(prior_\w+_\d)\.attn_layers\.(\d+)\.(\w+_aggregate_block)\.(norm\d|fn\.\w+)\.(\w+)",
        lambda m: (
            f"backbone.fusion.{_RESUNET_PLACES[m[1]]}.blocks.{m[2]}.{_ATTENTION[m[3]]}."
            f"{_NORM.get(m[4]) or m[4].removeprefix('fn.')}.{m[5]}"
        ),
    ),
    (
        r"(prior_\w+_\d)\.attn_layers\.(\d+)\.(\w+_ffn)\.(?:fn\.)?(norm|fc1|fc2)\.(\w+)",
        lambda m: f"backbone.fusion.{_RESUNET_PLACES[m[1]]}.blocks.{m[2]}.{_MLP[m[3]]}.{m[4]}.{m[5]}",
    ),
]


_MEDFORMER_PLACES: dict[str, str] = dict(zip(("down2", "down3", "down4", "up1", "up2"), PLACES, strict=True))
_MAP_PARTS = {
    "0.norm": "attentions.{}.norm",
    "0.fn.to_qkv": "attentions.{}.to_qkv",
    "0.fn.to_out": "attentions.{}.to_out",
    "1.norm": "mlps.{}.norm",
    "1.fn.fc1": "mlps.{}.fc1",
    "1.fn.fc2": "mlps.{}.fc2",
}
_BLOCK = r"(down[234]|up[12])\.trans_blocks\.blocks\.(\d+)\."


def _block(m: re.Match[str]) -> str:
    return f"backbone.fusion.{_MEDFORMER_PLACES[m[1]]}.blocks.{m[2]}"


_MEDFORMER_RULES: list[Rule] = [
    *_HEAD_RULES,
    (r"down(\d)\.patch_merging\.(reduction\.\w+\.weight)", lambda m: f"backbone.merge.{int(m[1]) - 1}.{m[2]}"),
    (rf"down1\.conv_blocks\.(\d+)\.{_KERNEL}", lambda m: f"backbone.down1.blocks.{m[1]}.{m[2]}"),
    (rf"up(\d)\.conv_blocks\.(\d+)\.{_KERNEL}", lambda m: f"backbone.up.{int(m[1]) - 3}.blocks.{m[2]}.{m[3]}"),
    (r"down(\d)\.map_gen\.(\w+\.weight)", lambda m: f"backbone.maps.{int(m[1]) - 2}.{m[2]}"),
    (r"(\w+)\.prior_selection\.(task|modality)_prior", lambda m: f"pools.{_MEDFORMER_PLACES[m[1]]}.{m[2]}"),
    (r"up(\d)\.map_reduction\.weight", lambda m: f"backbone.map_reduction.{int(m[1]) - 1}.weight"),
    (r"map_fusion\.((?:in|out)_proj\.\d\.weight)", lambda m: f"backbone.map_fusion.{m[1]}"),
    (
        r"map_fusion\.fusion\.layers\.(\d+)\.(\d\.(?:norm|fn\.\w+))\.(\w+)",
        lambda m: f"backbone.map_fusion.{_MAP_PARTS[m[2]].format(m[1])}.{m[3]}",
    ),
    (rf"{_BLOCK}norm2\.(\w+)", lambda m: f"{_block(m)}.norm_tokens.{m[3]}"),
    (rf"{_BLOCK}attn\.([\w.]+)", lambda m: f"{_block(m)}.attention.{m[3]}"),
    (rf"{_BLOCK}shortcut\.conv\.weight", lambda m: f"{_block(m)}.shortcut.weight"),
    (rf"{_BLOCK}feedforward\.(\w+)\.conv\.weight", lambda m: f"{_block(m)}.feedforward.{m[3]}.weight"),
    (
        rf"{_BLOCK}feedforward\.se\.excitation\.([02])\.(\w+)",
        lambda m: f"{_block(m)}.feedforward.{'squeeze' if m[3] == '0' else 'excite'}.{m[4]}",
    ),
]


def from_state_dict(state: Mapping[str, Tensor]) -> Hermes:
    """A model with the weights of a published state dict (Hermes-R of any base width and block list; Hermes-M).

    It keeps the published conventions: -1 in `task_ids` is the null token, attended to; -1 in `modality_ids` is the last
    modality. No column is added, so the result is that of the published module for the same ids.

    Raises:
        ModelError: missing or unexpected names, or a tensor of another shape (named, with both shapes).
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    model = _empty_medformer(state) if is_medformer(state) else _empty_resunet(state)
    load_weights(model, translate(state), {new: old for old, new in rename(state).items()})
    return model


def is_medformer(names: Iterable[str]) -> bool:
    """Whether published names are those of a Hermes-M."""
    return any(name.startswith(("map_fusion.", "out_classifier.")) for name in names)


def rename(names: Iterable[str]) -> dict[str, str]:
    """Published name -> name here. Raises ModelError listing names that no published model has."""
    renamed: dict[str, str] = {}
    unknown: list[str] = []
    names = list(names)
    rules = _MEDFORMER_RULES if is_medformer(names) else _RESUNET_RULES
    for name in names:
        for pattern, rule in rules:
            match = re.fullmatch(pattern, name)
            if match:
                renamed[name] = rule(match)
                break
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"unexpected names in the state dict: {_some(unknown)}; expected those of a published Hermes-R or Hermes-M"
        )
    return renamed


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names used here, in the layout used here.

    The null token is split from the task tables. Hermes-M's decoder concatenates [upsampled, skip], this one [skip, upsampled];
    its squeeze-and-excitation layers are linear here.
    """
    weights: dict[str, Tensor] = {}
    for old, new in rename(state).items():
        value = state[old]
        if new.endswith(".task"):
            weights[f"{new.removesuffix('.task')}.null"], value = value[-1:], value[:-1]
        elif re.fullmatch(r"up\d\.conv_blocks\.0\.(conv1|shortcut)\.conv\.weight", old):
            value = value.roll(value.shape[0], dims=1)
        elif ".se.excitation." in old and value.dim() == 5:
            value = value.flatten(1)
        weights[new] = value
    return weights


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], published_names: Mapping[str, str]) -> None:
    """Copy weights into a model. Raises ModelError for missing names, unexpected names, and shapes that differ."""
    own = dict(model.named_parameters())
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    if missing or unexpected:
        said = [published_names.get(n, n) for n in unexpected]
        raise ModelError(f"the state dict does not fit the model: missing {_some(missing)}; unexpected {_some(said)}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ModelError(
                    f"tensor {published_names.get(name, name)}: the state dict has shape {tuple(weights[name].shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
            parameter.copy_(weights[name])


def _some(names: list[str]) -> str:
    return ("none" if not names else ", ".join(names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many indices the group of `pattern` takes over all names."""
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(f"the state dict has no tensor {name!r}; is it a published Hermes-R or Hermes-M?")
    return tuple(state[name].shape)


def block_counts(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Residual blocks of a published Hermes-R: encoder at 2x, 4x, 8x, 16x; decoder at 8x, 4x, 2x, 1x."""
    encoder = [_count(state, rf"down{i}\.conv\.(\d+)\.") for i in range(1, 5)]
    return encoder, [_count(state, rf"up{i}\.conv\.(\d+)\.") for i in range(1, 5)]


def _empty_resunet(state: Mapping[str, Tensor]) -> Hermes:
    base = _shape(state, "inc.conv1.weight")[0]
    encoder, decoder = block_counts(state)
    depth = {place: _count(state, rf"{name}\.attn_layers\.(\d+)\.") for name, place in _RESUNET_PLACES.items()}
    backbone = ResUNet(base, encoder, decoder, Fusion(depth, bidirectional=True, kind="fused"))
    return Hermes(backbone, **_pools(state, backbone.place_channels, _RESUNET_PLACES))


def _pools(state: Mapping[str, Tensor], channels: Mapping[str, int], names: Mapping[str, str]) -> dict[str, Any]:
    """The pools and counts of a published state dict, as arguments of Hermes."""
    first = next(iter(names))
    n_rows = _shape(state, f"{first}.task_prior")[0]
    n_modalities, length, _ = _shape(state, f"{first}.modality_prior")
    pools = {
        place: PriorPool(channels[place], n_tasks=n_rows - 1, n_modalities=n_modalities, length=length, null=True)
        for place in names.values()
    }
    return {"pools": pools, "n_tasks": n_rows - 1, "n_modalities": n_modalities}


def _empty_medformer(state: Mapping[str, Tensor]) -> Hermes:
    base = _shape(state, "inc.conv1.weight")[0]
    backbone = MedFormer(
        base,
        {p: _count(state, rf"{name}\.trans_blocks\.blocks\.(\d+)\.") for name, p in _MEDFORMER_PLACES.items()},
        fusion=Fusion({}, bidirectional=True, kind="fused"),
        conv_blocks=[_count(state, rf"{stage}\.conv_blocks\.(\d+)\.") for stage in ("down1", "up3", "up4")],
        map_tokens=_shape(state, "down2.map_gen.semantic_proj.weight")[0],
        fusion_layers=_count(state, r"map_fusion\.fusion\.layers\.(\d+)\."),
    )
    names = {f"{stage}.prior_selection": place for stage, place in _MEDFORMER_PLACES.items()}
    aux = backbone.aux_channels if any(name.startswith("aux_classifier.") for name in state) else 0
    return Hermes(backbone, **_pools(state, backbone.place_channels, names), aux_channels=aux)
