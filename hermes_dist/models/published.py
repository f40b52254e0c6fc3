"""Weights of the released checkpoints: from published names to a ready model (facts 2.2 to 2.4).

What a checkpoint says about the architecture is read from it: widths, block counts, prior counts, token length. One thing
differs from the published layout: the null token, last row of the published task tables, is a tensor of its own here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
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
_MEDFORMER_PLACES: dict[str, str] = dict(zip(("down2", "down3", "down4", "up1", "up2"), PLACES, strict=True))

Words = Mapping[str, Mapping[str, str]]
Pair = tuple[str, str]
"""A name as published, and here. A field is one of `Words` (`{place}`), a number (`{i}`, shifted: `{i-1}`), or free (`_FREE`)."""

_FIELD = re.compile(r"\{(\w+)(-\d)?\}")
_FREE = {"i": r"\d+", "j": r"\d+", "word": r"\w+", "param": r"weight|bias", "path": r"[\w.]+"}
_WORDS: Words = {
    "kernel": {name: name for name in ("conv1", "conv2", "shortcut")},
    "table": {"task_prior": "task", "modality_prior": "modality"},
    "linear": {"0.fc1": "fc1", "0.fc2": "fc2", "1.fc1": "fc3", "1.fc2": "fc4"},
    "read": {"prior_aggregate_block": "tokens_read", "feat_aggregate_block": "features_read"},
    "part": {"norm1": "norm_q", "norm2": "norm_kv", "fn.to_q": "to_q", "fn.to_kv": "to_kv", "fn.to_out": "to_out"},
    "mlp": {"prior_ffn": "tokens_mlp", "feat_ffn": "features_mlp"},
    "norm": {"norm": "norm", "fn.fc1": "fc1", "fn.fc2": "fc2"},
    "se": {"0": "squeeze", "2": "excite"},
}
_RESUNET_WORDS: Words = {**_WORDS, "place": _RESUNET_PLACES, "head": {"out": "head"}}
_MEDFORMER_WORDS: Words = {
    **_WORDS,
    "place": _MEDFORMER_PLACES,
    "head": {"out_classifier": "head", "aux_classifier": "aux_head"},
}
_HEAD_PAIRS: list[Pair] = [
    ("{head}.norm.{param}", "{head}.norm.{param}"),
    ("{head}.classifier_pred.{linear}.{param}", "{head}.{linear}.{param}"),
    ("mod_out.norm.{param}", "modality_head.norm.{param}"),
    ("mod_out.classifier.{word}.{param}", "modality_head.{word}.{param}"),
    ("inc.conv1.weight", "backbone.stem.conv.weight"),
    ("inc.conv2.{kernel}.conv.weight", "backbone.stem.block.{kernel}"),
]
_LAYER, _FUSED = "{place}.attn_layers.{j}", "backbone.fusion.{place}.blocks.{j}"
_RESUNET_PAIRS: list[Pair] = [
    *_HEAD_PAIRS,
    ("down{i}.conv.{j}.{kernel}.conv.weight", "backbone.down.{i-1}.blocks.{j-1}.{kernel}"),
    ("up{i}.conv.{j}.{kernel}.conv.weight", "backbone.up.{i-1}.blocks.{j}.{kernel}"),
    ("{place}.{table}", "pools.{place}.{table}"),
    (f"{_LAYER}.{{read}}.{{part}}.{{param}}", f"{_FUSED}.{{read}}.{{part}}.{{param}}"),
    (f"{_LAYER}.{{mlp}}.{{norm}}.{{param}}", f"{_FUSED}.{{mlp}}.{{norm}}.{{param}}"),
]
_BLOCK, _MAPS = "{place}.trans_blocks.blocks.{j}", "map_fusion.fusion.layers.{j}"
_MEDFORMER_PAIRS: list[Pair] = [
    *_HEAD_PAIRS,
    ("down{i}.patch_merging.reduction.{word}.weight", "backbone.merge.{i-1}.reduction.{word}.weight"),
    ("down1.conv_blocks.{j}.{kernel}.conv.weight", "backbone.down1.blocks.{j}.{kernel}"),
    ("up{i}.conv_blocks.{j}.{kernel}.conv.weight", "backbone.up.{i-3}.blocks.{j}.{kernel}"),
    ("down{i}.map_gen.{word}.weight", "backbone.maps.{i-2}.{word}.weight"),
    ("{place}.prior_selection.{table}", "pools.{place}.{table}"),
    ("up{i}.map_reduction.weight", "backbone.map_reduction.{i-1}.weight"),
    ("map_fusion.{word}.{j}.weight", "backbone.map_fusion.{word}.{j}.weight"),
    (f"{_MAPS}.0.norm.{{param}}", "backbone.map_fusion.attentions.{j}.norm.{param}"),
    (f"{_MAPS}.0.fn.{{word}}.{{param}}", "backbone.map_fusion.attentions.{j}.{word}.{param}"),
    (f"{_MAPS}.1.norm.{{param}}", "backbone.map_fusion.mlps.{j}.norm.{param}"),
    (f"{_MAPS}.1.fn.{{word}}.{{param}}", "backbone.map_fusion.mlps.{j}.{word}.{param}"),
    (f"{_BLOCK}.norm2.{{param}}", f"{_FUSED}.norm_tokens.{{param}}"),
    (f"{_BLOCK}.attn.{{path}}", f"{_FUSED}.attention.{{path}}"),
    (f"{_BLOCK}.shortcut.conv.weight", f"{_FUSED}.shortcut.weight"),
    (f"{_BLOCK}.feedforward.se.excitation.{{se}}.{{param}}", f"{_FUSED}.feedforward.{{se}}.{{param}}"),
    (f"{_BLOCK}.feedforward.{{word}}.conv.weight", f"{_FUSED}.feedforward.{{word}}.weight"),
]

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


@cache
def _rules(medformer: bool, back: bool) -> list[Rule]:
    """From published names to those here, or `back`."""
    pairs, words = (_MEDFORMER_PAIRS, _MEDFORMER_WORDS) if medformer else (_RESUNET_PAIRS, _RESUNET_WORDS)
    if back:
        pairs = [(here, published) for published, here in pairs]
        words = {field: {here: published for published, here in known.items()} for field, known in words.items()}
    return [_rule(source, target, words) for source, target in pairs]


def _rule(source: str, target: str, words: Words) -> Rule:
    shifts = {m[1]: int(m[2] or 0) for m in _FIELD.finditer(source)}

    def expression(field: re.Match[str]) -> str:
        known = words.get(field[1])
        return f"(?P<{field[1]}>{_FREE[field[1]] if known is None else '|'.join(map(re.escape, known))})"

    def fill(match: re.Match[str]) -> str:
        def value(field: re.Match[str]) -> str:
            text = match[field[1]]
            if field[1] in ("i", "j"):
                return str(int(text) - shifts[field[1]] + int(field[2] or 0))
            return words[field[1]][text] if field[1] in words else text

        return _FIELD.sub(value, target)

    return re.compile(_FIELD.sub(expression, source.replace(".", r"\."))), fill


def _rewrite(name: str, rules: Iterable[Rule]) -> str | None:
    for pattern, fill in rules:
        match = pattern.fullmatch(name)
        if match:
            return fill(match)
    return None


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
    names = list(names)
    rules = _rules(is_medformer(names), back=False)
    found = {name: _rewrite(name, rules) for name in names}
    unknown = [name for name, here in found.items() if here is None]
    if unknown:
        raise ModelError(
            f"unexpected names in the state dict: {_some(unknown)}; expected those of a published Hermes-R or Hermes-M"
        )
    return {name: here for name, here in found.items() if here is not None}


def published_name(name: str, *, medformer: bool) -> str:
    """The inverse of `rename` for one name (the null token lies in the published task table); itself where there is none."""
    name = f"{name.removesuffix('.null')}.task" if name.endswith(".null") else name
    return _rewrite(name, _rules(medformer, back=True)) or name


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names used here, in the layout used here.

    The null token is split from the task tables. Hermes-M's decoder concatenates [upsampled, skip], this one [skip, upsampled];
    its squeeze-and-excitation layers are linear here.
    """
    weights: dict[str, Tensor] = {}
    for old, new in rename(state).items():
        value = state[old]
        if new.endswith(".task"):
            _shape(state, old, 2)
            weights[f"{new.removesuffix('.task')}.null"], value = value[-1:], value[:-1]
        elif re.fullmatch(r"up\d\.conv_blocks\.0\.(conv1|shortcut)\.conv\.weight", old):
            _shape(state, old, 5)
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
        medformer = is_medformer(published_names.values())
        wanted = sorted({published_name(n, medformer=medformer) for n in missing})
        said = [published_names.get(n, n) for n in unexpected]
        raise ModelError(f"the state dict does not fit the model: missing {_some(wanted)}; unexpected {_some(said)}")
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


def _shape(state: Mapping[str, Tensor], name: str, n_axes: int) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(f"the state dict has no tensor {name!r}; is it a published Hermes-R or Hermes-M?")
    shape = tuple(state[name].shape)
    if len(shape) != n_axes or 0 in shape:
        raise ModelError(f"tensor {name}: the state dict has shape {shape}, expected {n_axes} axes, none of them empty")
    return shape


def base_channels(state: Mapping[str, Tensor]) -> int:
    """Channels of the stem. Raises ModelError if the stem is missing or no convolution."""
    return _shape(state, "inc.conv1.weight", 5)[0]


def block_counts(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Residual blocks of a published Hermes-R: encoder at 2x, 4x, 8x, 16x; decoder at 8x, 4x, 2x, 1x."""
    encoder = [_count(state, rf"down{i}\.conv\.(\d+)\.") for i in range(1, 5)]
    return encoder, [_count(state, rf"up{i}\.conv\.(\d+)\.") for i in range(1, 5)]


def _empty_resunet(state: Mapping[str, Tensor]) -> Hermes:
    base = base_channels(state)
    encoder, decoder = block_counts(state)
    depth = {place: _count(state, rf"{name}\.attn_layers\.(\d+)\.") for name, place in _RESUNET_PLACES.items()}
    backbone = ResUNet(base, encoder, decoder, Fusion(depth, bidirectional=True, kind="fused"))
    return Hermes(backbone, **_pools(state, backbone.place_channels, _RESUNET_PLACES))


def _pools(state: Mapping[str, Tensor], channels: Mapping[str, int], names: Mapping[str, str]) -> dict[str, Any]:
    """The pools and counts of a published state dict, as arguments of Hermes."""
    first = next(iter(names))
    n_rows = _shape(state, f"{first}.task_prior", 2)[0]
    n_modalities, length, _ = _shape(state, f"{first}.modality_prior", 3)
    pools = {
        place: PriorPool(channels[place], n_tasks=n_rows - 1, n_modalities=n_modalities, length=length, null=True)
        for place in names.values()
    }
    return {"pools": pools, "n_tasks": n_rows - 1, "n_modalities": n_modalities}


def _empty_medformer(state: Mapping[str, Tensor]) -> Hermes:
    base = base_channels(state)
    backbone = MedFormer(
        base,
        {p: _count(state, rf"{name}\.trans_blocks\.blocks\.(\d+)\.") for name, p in _MEDFORMER_PLACES.items()},
        fusion=Fusion({}, bidirectional=True, kind="fused"),
        conv_blocks=[_count(state, rf"{stage}\.conv_blocks\.(\d+)\.") for stage in ("down1", "up3", "up4")],
        map_tokens=_shape(state, "down2.map_gen.semantic_proj.weight", 5)[0],
        fusion_layers=_count(state, r"map_fusion\.fusion\.layers\.(\d+)\."),
    )
    names = {f"{stage}.prior_selection": place for stage, place in _MEDFORMER_PLACES.items()}
    aux = backbone.aux_channels if any(name.startswith("aux_classifier.") for name in state) else 0
    return Hermes(backbone, **_pools(state, backbone.place_channels, names), aux_channels=aux)
