"""Import of released checkpoints: the paper's table, safe loading, a run directory whose model gives the published numbers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hermes_dist.config import load_config
from hermes_dist.errors import ModelError
from hermes_dist.models import build_model
from hermes_dist.models.published import from_state_dict
from hermes_dist.models.release import MODALITIES, paper_tasks, read_checkpoint
from hermes_dist.tasks import TaskTable

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = (1, 2, 1, 2)


def published_state(base: int = 8, blocks: tuple[int, int, int, int] = BLOCKS, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under published names, Hermes-R of a block list."""
    shapes: dict[str, tuple[int, ...]] = {"inc.conv1.weight": (base, 1, 3, 3, 3)}
    kernel = (3, 3, 3)

    def block(prefix: str, i: int, o: int) -> None:
        shapes[f"{prefix}.conv1.conv.weight"] = (o, i, *kernel)
        shapes[f"{prefix}.conv2.conv.weight"] = (o, o, *kernel)
        if i != o:
            shapes[f"{prefix}.shortcut.conv.weight"] = (o, i, *kernel)

    c = [base * w for w in (1, 2, 4, 8, 10)]
    block("inc.conv2", base, base)
    for s in range(4):
        for n in range(blocks[s]):
            block(f"down{s + 1}.conv.{n + 1}", c[s] if n == 0 else c[s + 1], c[s + 1])
        for n in range((blocks[2], blocks[1], blocks[0], 2)[s]):
            block(f"up{s + 1}.conv.{n}", c[4 - s] + c[3 - s] if n == 0 else c[3 - s], c[3 - s])
    names = ("prior_init_fuse_2", "prior_init_fuse_3", "prior_init_fuse_4", "prior_fuse_5", "prior_fuse_6")
    for name, w, depth in zip(names, (c[2], c[3], c[4], c[3], c[2]), (2, 2, 4, 2, 2), strict=True):
        shapes |= {f"{name}.task_prior": (73, w), f"{name}.modality_prior": (6, 10, w)}
        inner = 32 * (w // 32)
        for n in range(depth):
            for side in ("prior", "feat"):
                p = f"{name}.attn_layers.{n}.{side}_aggregate_block"
                shapes |= {
                    f"{p}.{x}": (w,) for x in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "fn.to_out.bias")
                }
                shapes |= {f"{p}.fn.to_q.weight": (inner, w), f"{p}.fn.to_kv.weight": (2 * inner, w)}
                shapes |= {f"{p}.fn.to_out.weight": (w, inner)}
                p = f"{name}.attn_layers.{n}.{side}_ffn"
                shapes |= {f"{p}.norm.weight": (w,), f"{p}.norm.bias": (w,), f"{p}.fn.fc1.weight": (4 * w, w)}
                shapes |= {f"{p}.fn.fc1.bias": (4 * w,), f"{p}.fn.fc2.weight": (w, 4 * w), f"{p}.fn.fc2.bias": (w,)}
    wide = 34 * base
    for prefix, dims in (
        ("out.classifier_pred.0", (wide, wide, base)),
        ("out.classifier_pred.1", (base, base, base)),
        ("mod_out.classifier", (wide, wide, 6)),
    ):
        for n in (1, 2):
            shapes |= {f"{prefix}.fc{n}.weight": (dims[n], dims[n - 1]), f"{prefix}.fc{n}.bias": (dims[n],)}
    for prefix in ("out.norm", "mod_out.norm"):
        shapes |= {f"{prefix}.weight": (wide,), f"{prefix}.bias": (wide,)}
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * (0.05 if len(s) > 1 else 0.3) for n, s in shapes.items()}


def test_the_papers_table() -> None:
    tasks = paper_tasks()
    assert tasks.n_tasks == 71
    assert sum(len(d.classes) for d in tasks.datasets if d.name != "chaos_t2") == 84
    first_and_last = {d.name: (d.task_ids[0], d.task_ids[-1]) for d in tasks.datasets}
    assert first_and_last == {
        "lits": (0, 1),
        "kits": (2, 3),
        "amos_ct": (4, 18),
        "amos_mr": (4, 16),
        "bcv": (19, 31),
        "structseg_oar": (32, 37),
        "chaos_t1": (38, 41),
        "chaos_t2": (38, 41),
        "structseg_head_oar": (42, 63),
        "mnm": (64, 66),
        "brain_structure": (67, 69),
        "autopet": (70, 70),
    }
    assert set(tasks.modalities) == set(MODALITIES)


def import_run(tmp_path: Path, content: Any) -> Path:
    checkpoint, out = tmp_path / "latest.pth", tmp_path / "runs" / "imported"
    torch.save(content, checkpoint)
    command = [sys.executable, str(ROOT / "launch" / "import_published.py"), str(checkpoint), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return out


def test_imported_run_gives_the_published_numbers(tmp_path: Path) -> None:
    state = published_state()
    ema = {f"module.{name}": tensor for name, tensor in state.items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    out = import_run(tmp_path, {"epoch": 3, "model_state_dict": plain, "ema_model_state_dict": ema, "optimizer_state_dict": {}})
    config = load_config(out / "config.json")
    tasks = TaskTable.from_json(json.loads((out / "tasks.json").read_text()))
    assert config.model.blocks == BLOCKS
    assert config.model.priors.padding == "attended"
    assert config.loss.overlap == "tversky"
    model = build_model(config.model, tasks)
    model.load_state_dict(load_file(out / "weights.safetensors"))
    published = from_state_dict(state)
    image = torch.randn(1, 1, 16, 16, 32)
    for modality in ("CT", "MR", "PET"):
        row = MODALITIES.index(modality)
        ids = torch.tensor([[4, 18, 70, -1]])
        with torch.no_grad():
            ours = model(image, ids, torch.tensor([tasks.modality_id(modality)]))
            theirs = published(image, ids, torch.tensor([-1 if modality == "MR" else row]))
        torch.testing.assert_close(ours.mask_logits, theirs.mask_logits)
        order = [MODALITIES.index(m) for m in tasks.modalities]
        torch.testing.assert_close(ours.modality_logits, theirs.modality_logits[:, order])


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "executed", "x"))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"ema_model_state_dict": Evil()}))
    with pytest.raises(ModelError, match=r"evil\.pth: not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("content", "message"), [({"epoch": 1}, "expected a state dict"), (7, "expected a state dict")])
def test_files_without_a_state_dict_are_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path / "odd.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pth"):
        read_checkpoint(tmp_path / "absent.pth")


def test_wrong_tensors_are_named_with_both_shapes() -> None:
    state = published_state()
    wrong = {**state, "down2.conv.1.conv2.conv.weight": torch.zeros(32, 31, 3, 3, 3)}
    with pytest.raises(ModelError, match=r"down2\.conv\.1\.conv2\.conv\.weight: .*\(32, 31, 3, 3, 3\).*\(32, 32, 3, 3, 3\)"):
        from_state_dict(wrong)
    with pytest.raises(ModelError, match=r"unexpected names in the state dict: decoder\.weight"):
        from_state_dict({**state, "decoder.weight": torch.zeros(1)})
    del state["out.norm.bias"]
    with pytest.raises(ModelError, match=r"missing head\.norm\.bias"):
        from_state_dict(state)
