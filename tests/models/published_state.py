"""Random weights under the names of a released Hermes-R."""

from __future__ import annotations

import torch
from torch import Tensor

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
