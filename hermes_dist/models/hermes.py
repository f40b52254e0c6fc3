"""Hermes: context priors fused into a backbone, posteriors turned into classifiers (paper section 3; facts 1.3 to 1.5)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hermes_dist.config import ModelConfig
from hermes_dist.errors import ConfigError
from hermes_dist.models import medformer
from hermes_dist.models.ids import Columns, check_columns
from hermes_dist.models.medformer import MedFormer
from hermes_dist.models.output import ModelOutput
from hermes_dist.models.priors import PLACES, ModalityHead, PriorPool, PrototypeHead, join_posteriors
from hermes_dist.models.resunet import FUSION_DEPTH, Fusion, ResUNet
from hermes_dist.tasks import TaskTable


class Hermes(nn.Module):
    """A fused backbone with its prior pools and heads.

    With attended padding (published), an output depends on the number of padding columns, and the published training and
    inference always see at least one: the caller adds it.
    """

    def __init__(
        self,
        backbone: ResUNet | MedFormer,
        pools: dict[str, PriorPool],
        *,
        n_tasks: int,
        n_modalities: int,
        aux_channels: int = 0,
    ) -> None:
        super().__init__()
        self.n_tasks, self.n_modalities = n_tasks, n_modalities
        self.backbone = backbone
        self.pools = nn.ModuleDict({str(place): pool for place, pool in pools.items()})
        width = sum(pool.task.shape[1] for pool in pools.values())
        self.head = PrototypeHead(width, backbone.out_channels)
        self.aux_head = PrototypeHead(width, aux_channels) if aux_channels else None
        self.modality_head = ModalityHead(width, n_modalities) if n_modalities else None
        self.attended = next(iter(pools.values())).null is not None

    def forward(
        self, image: Float[Tensor, "B 1 Z Y X"], task_ids: Int[Tensor, "B T"], modality_ids: Int[Tensor, " B"]
    ) -> ModelOutput:
        """Logits of the asked tasks.

        Args:
            image: preprocessed patch.
            task_ids: global task ids; -1 = padding.
            modality_ids: modality of each sample (-1 = the last one, in models with attended padding only).

        Raises:
            ModelError: ids out of range, or sides too small for the stages.
        """
        asked = task_ids.shape[1]
        modality_range = (-1 if self.attended else 0, self.n_modalities - 1) if self.n_modalities else None
        columns = check_columns(task_ids, modality_ids, n_tasks=self.n_tasks, modality_range=modality_range, device=image.device)
        tokens = {place: pool(columns) for place, pool in self.pools.items()}
        keep = None if self.attended else _keep(columns, next(iter(tokens.values())).shape[1])
        features, aux_features, posteriors = self.backbone(image, tokens, keep)
        joined = join_posteriors(posteriors)
        tasks, modality = joined[:, :asked], joined[:, asked:]
        aux = None
        if self.aux_head is not None and aux_features is not None:
            aux = functional.interpolate(
                self.aux_head(tasks, aux_features), size=image.shape[2:], mode="trilinear", align_corners=True
            )
        return ModelOutput(self.head(tasks, features), aux, None if self.modality_head is None else self.modality_head(modality))


def _keep(columns: Columns, n_tokens: int) -> Tensor | None:
    """Which tokens may be read: real task columns and all modality tokens; None = all."""
    if columns.real is None:
        return None
    return functional.pad(columns.real, (0, n_tokens - columns.real.shape[1]), value=True)


def build_hermes(config: ModelConfig, tasks: TaskTable) -> Hermes:
    """Hermes as configured, for the tasks and modalities of a table. Raises ConfigError for a backbone without fusion."""
    if config.backbone not in HERMES_BACKBONES:
        raise ConfigError(
            f"model.backbone = {config.backbone!r} has no prior fusion; method 'hermes' takes {', '.join(HERMES_BACKBONES)}, "
            "or choose model.method = 'traditional'"
        )
    priors = config.priors
    if not priors.scales:
        raise ConfigError("model.priors.scales is empty; name at least one of enc4, enc8, enc16, dec8, dec4")
    backbone = HERMES_BACKBONES[config.backbone](config)
    n_modalities = len(tasks.modalities) if priors.modality else 0
    attended = priors.padding == "attended"
    pools = {
        place: PriorPool(
            backbone.place_channels[place],
            n_tasks=tasks.n_tasks,
            n_modalities=n_modalities,
            length=priors.length,
            null=attended,
            init_scale=priors.init_scale,
        )
        for place in PLACES
        if place in priors.scales
    }
    aux_channels = backbone.aux_channels if isinstance(backbone, MedFormer) else 0
    return Hermes(backbone, pools, n_tasks=tasks.n_tasks, n_modalities=n_modalities, aux_channels=aux_channels)


def fused_resunet(config: ModelConfig) -> ResUNet:
    """The ResUNet with fusion at the configured places."""
    depth = {place: n for place, n in FUSION_DEPTH.items() if place in config.priors.scales}
    fusion = Fusion(depth, config.priors.direction == "bidirectional", config.attention)
    return ResUNet(config.base_channels, config.blocks, decoder_blocks(config.blocks), fusion)


def fused_medformer(config: ModelConfig) -> MedFormer:
    """The published MedFormer; `model.priors.scales` says where priors join its tokens."""
    fusion = Fusion({}, config.priors.direction == "bidirectional", config.attention)
    return MedFormer(config.base_channels, medformer.FUSION_DEPTH, fusion=fusion)


def decoder_blocks(encoder_blocks: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The decoder mirrors the encoder stage at the same resolution; the last stage mirrors the stem and has two blocks.

    The only regular rule that gives the paper's 157.9 M for base 48 with (4, 4, 4, 4).
    """
    b2, b4, b8, _ = encoder_blocks
    return b8, b4, b2, 2


HERMES_BACKBONES: dict[str, Callable[[ModelConfig], ResUNet | MedFormer]] = {
    "resunet": fused_resunet,
    "medformer": fused_medformer,
}
