"""A released checkpoint as a run: the paper's task table, the configuration, and weights in this project's layout.

Facts 2.4 and 4.1. Rows of the published tables that no task or modality uses (task row 71) are left behind; modality rows are
reordered to the table's order of first appearance. Class names other than DLBS's appear nowhere in the published code: they
follow the datasets' own label tables. All names are those of `configs/collections/hermes_upstream.json`, since rows and stores
meet by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from hermes_dist.config import Config, resolve, validate
from hermes_dist.errors import ModelError
from hermes_dist.models import build_model
from hermes_dist.models.published import base_channels, block_counts, is_medformer, load_weights, rename, translate
from hermes_dist.tasks import TaskTable

MODALITIES = ("CT", "PET", "T1", "T2", "cineMRI", "MR")
"""Rows of the published modality tables; the last one is MR of unknown sequence (all of AMOS MR)."""

_ABDOMEN = (
    "spleen right_kidney left_kidney gallbladder esophagus liver stomach aorta postcava pancreas right_adrenal_gland "
    "left_adrenal_gland duodenum"
)
_BTCV = (
    "spleen right_kidney left_kidney gallbladder esophagus liver stomach aorta inferior_vena_cava portal_and_splenic_vein "
    "pancreas right_adrenal_gland left_adrenal_gland"
)
_HEAD = (
    "left_eye right_eye left_lens right_lens left_optic_nerve right_optic_nerve optic_chiasm pituitary brainstem "
    "left_temporal_lobe right_temporal_lobe spinal_cord left_parotid right_parotid left_inner_ear right_inner_ear "
    "left_middle_ear right_middle_ear left_temporomandibular_joint right_temporomandibular_joint left_mandible right_mandible"
)
_CHAOS = "liver right_kidney left_kidney spleen"
_DATASETS = (
    ("lits", "CT", "abdomen", "liver tumour"),
    ("kits", "CT", "abdomen", "kidney tumour"),
    ("amos_ct", "CT", "abdomen", f"{_ABDOMEN} bladder prostate_uterus"),
    ("amos_mr", "MR", "abdomen", _ABDOMEN),
    ("bcv", "CT", "abdomen", _BTCV),
    ("structseg_oar", "CT", "thorax", "left_lung right_lung spinal_cord esophagus heart trachea"),
    ("chaos_t1", "T1", "abdomen", _CHAOS),
    ("chaos_t2", "T2", "abdomen", _CHAOS),
    ("structseg_head_oar", "CT", "head and neck", _HEAD),
    ("mnm", "cineMRI", "heart", "left_ventricle myocardium right_ventricle"),
    ("brain_structure", "T1", "brain", "grey_matter white_matter cerebrospinal_fluid"),
    ("autopet", "PET", "whole body", "lesion"),
)


def paper_tasks() -> TaskTable:
    """The 71 tasks of the paper's eleven datasets, ids as published; label values count from 1 in every dataset.

    AMOS CT and MR share their tasks. CHAOS, one dataset of two sequences with the same tasks, has a row for each, because a
    row of the table has one modality.
    """
    rows = [
        (name, modality, region, [(c, [value]) for value, c in enumerate(classes.split(), start=1)], None)
        for name, modality, region, classes in _DATASETS
    ]
    shared = [[f"amos_ct/{c}", f"amos_mr/{c}"] for c in _ABDOMEN.split()]
    shared += [[f"chaos_t1/{c}", f"chaos_t2/{c}"] for c in _CHAOS.split()]
    return TaskTable.build(rows, shared)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a published checkpoint, else its plain ones, else the file as a bare state dict.

    Loads weights only: a pickle that would run code is refused.

    Raises:
        ModelError: no such file, not a torch file, unsafe content, or no state dict in it.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not a checkpoint that can be read without running its code: {first_line}") from None
    for key in ("ema_model_state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and content.get(key):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path}: expected a state dict of tensors, alone or under 'ema_model_state_dict' or 'model_state_dict'")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def release_config(state: Mapping[str, Tensor], out: Path) -> Config:
    """The resolved configuration of a run directory `out` with these weights (reading: published).

    Raises:
        ModelError: no Hermes-R or Hermes-M.
    """
    model: dict[str, Any] = {"reading": "published", "base_channels": base_channels(state)}
    if is_medformer(state):
        model["backbone"] = "medformer"
    else:
        model["blocks"] = block_counts(state)[0]
    return resolve(validate({"run": {"name": out.name, "output_dir": str(out.parent)}, "model": model}))


def release_weights(state: Mapping[str, Tensor], config: Config, tasks: TaskTable) -> dict[str, Tensor]:
    """Weights named and shaped as `build_model(config.model, tasks)` has them.

    Raises:
        ModelError: tables too small for the paper's tasks and modalities, or a structure that the configuration cannot express
            (`published.from_state_dict` still reads it).
    """
    names = {new: old for old, new in rename(state).items()}
    weights = {name: _cut(name, tensor, tasks, names.get(name, name)) for name, tensor in translate(state).items()}
    model = build_model(config.model, tasks)
    load_weights(model, weights, names)
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def _cut(name: str, tensor: Tensor, tasks: TaskTable, published: str) -> Tensor:
    """Rows of the paper's tasks, and modality rows in the table's order."""
    if name.endswith(".task"):
        return _rows(tensor, range(tasks.n_tasks), published)
    if name.endswith(".modality") or name.startswith("modality_head.fc2."):
        return _rows(tensor, [MODALITIES.index(m) for m in tasks.modalities], published)
    return tensor


def _rows(tensor: Tensor, rows: Sequence[int], name: str) -> Tensor:
    n_rows = tensor.shape[0] if tensor.ndim else 0
    if max(rows) >= n_rows:
        raise ModelError(f"tensor {name} has {n_rows} rows (without the null row); the paper's table needs {max(rows) + 1}")
    return tensor[list(rows)]
