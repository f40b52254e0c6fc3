"""Every knob, as frozen sections that equal the JSON file.

A part receives its section, never the root. What can be computed is not a knob. An unknown key is an error that names the
nearest known one. `model.reading` ("paper" or "published") is a preset: it fills every field left at `null` that READINGS
lists; the resolved configuration, complete, lies beside the run as `config.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

Vox3 = tuple[int, int, int]
Precision = Literal["fp32", "bf16"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, field docstrings become JSON Schema descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class RunConfig(Section):
    name: str = Field(default="run", min_length=1)
    """Name of the run; its directory is `output_dir/name`."""
    seed: int = 0
    """Moves the initialisation, the order of samples, crops and augmentation."""
    output_dir: str = "runs"
    """Folder that holds the run directories."""
    resume: str = "auto"
    """`auto` = go on from the newest complete checkpoint if there is one; `never` = start anew (in a new run directory);
    or a checkpoint's path."""


class MixtureConfig(Section):
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Share of a dataset ∝ (cases)^alpha: 1 = every case equally often, 0 = every dataset equally often."""
    weights: dict[str, float] | Literal["hermes"] | None = None
    """Explicit relative share per dataset name (replaces alpha; a dataset that is not named gets none); `hermes` = the
    published weights per volume, times the volumes that each dataset has here."""
    block: int = Field(default=256, ge=1)
    """Positions per block; within each block the shares are met exactly (by largest remainder)."""


class ForegroundConfig(Section):
    probability: float = Field(default=0.5, ge=0, le=1)
    """Chance that a patch is centred near a foreground voxel of a class drawn from those present in the case."""
    class_weights: dict[str, float] = {}
    """Relative weight of `dataset/class` names in that draw (default 1)."""


class DataConfig(Section):
    stores: tuple[str, ...] = ()
    """URLs or paths of shard stores written by `hermes-shard convert`; several are trained together."""
    split: str = "train"
    """Split that training reads."""
    patch_vox_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] = (128, 128, 128)
    """Training patch in voxels, Z Y X."""
    mixture: MixtureConfig = MixtureConfig()
    """How often each dataset is drawn."""
    foreground: ForegroundConfig = ForegroundConfig()
    """How patches are centred."""
    allow_changed_collection: bool = False
    """Resume although the stores' content hash differs from the checkpoint's (recorded in the run)."""


class FaultsConfig(Section):
    retries: int = Field(default=10, ge=0)
    """Attempts after the first for transient storage errors."""
    backoff_s: float = Field(default=0.2, gt=0)
    """First pause between attempts; doubles each time, with jitter, at most 30 s."""
    max_quarantined: int = Field(default=10, ge=0)
    """Distinct corrupt cases, over all ranks, that are replaced before the run stops."""
    chaos: dict[str, float] = {}
    """Fault injection for tests: `corrupt`, `transient`, `slow_s`, `kill` → probability or seconds per sample."""


class StreamConfig(Section):
    backend: Literal["ray", "inline"] = "ray"
    """`ray` = Ray Data workers; `inline` = the same samples read in the training process (debugging)."""
    workers: int = Field(default=1, ge=0)
    """Ray workers per rank."""
    max_workers: int | None = Field(default=None, ge=1)
    """Upper bound of autoscaling workers per rank (default: `workers`): more while the rank waits for samples, else fewer."""
    prefetch: int = Field(default=4, ge=1)
    """Samples per rank that may be ready in advance."""
    ray_address: str = "local"
    """`local` = a private cluster started by one rank of the host; else a Ray address (`auto`, host:port)."""
    object_store_mib: int = Field(default=512, ge=80)
    """Object store of a private Ray cluster, for each rank of the host."""
    wait_limit_s: float = Field(default=300, gt=0)
    """Longest wait for one sample; then the run stops and says what it waited for."""
    cache_mib: int = Field(default=0, ge=0)
    """Local disk cache for remote stores, shared by the workers of a host (0 = none); needs `cache_dir`."""
    cache_dir: str | None = Field(default=None, validate_default=True)
    """Folder of that cache; needs `cache_mib`."""
    faults: FaultsConfig = FaultsConfig()
    """Retries, quarantine and fault injection."""

    @field_validator("max_workers")
    @classmethod
    def _ordered_workers(cls, most: int | None, info: Any) -> int | None:
        least = info.data.get("workers", 0)
        if most is not None and most < least:
            raise ValueError(f"stream.max_workers bounds stream.workers={least} from above; expected at least {least}")
        return most

    @field_validator("cache_dir")
    @classmethod
    def _whole_cache(cls, folder: str | None, info: Any) -> str | None:
        if bool(folder) != bool(info.data.get("cache_mib", 0)):
            raise ValueError("a cache needs stream.cache_dir, its folder, and stream.cache_mib, its bound; set both or neither")
        return folder


class AugmentConfig(Section):
    enabled: bool = True
    """All augmentation on or off."""
    where: Literal["worker", "device", "auto"] = "worker"
    """On the data workers, batched on the training device, or decided by measured data wait."""
    spatial_probability: float = Field(default=0.5, ge=0, le=1)
    """Chance of the affine (rotation, scale, shear: one interpolation)."""
    rotation_deg: float = Field(default=30.0, ge=0, le=180)
    """Rotation U(-r, r) about each axis."""
    scale: float = Field(default=0.7, gt=0, le=1)
    """Scale U(s, 1/s) per axis."""
    shear: float = Field(default=0.1, ge=0, lt=1)
    """Six shear terms U(-h, h)."""
    intensity_probability: float = Field(default=0.15, ge=0, le=1)
    """Chance of each intensity change (brightness ×, brightness +, gamma, contrast, blur, noise)."""
    brightness: float = Field(default=0.3, ge=0, le=1)
    """Factor U(1-b, 1+b)."""
    brightness_add_std: float = Field(default=0.1, ge=0)
    """Offset N(0, std)."""
    gamma: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.5)
    """Exponent range."""
    contrast: float = Field(default=0.3, ge=0, le=1)
    """Factor U(1-c, 1+c) about the mean."""
    blur_sigma_vox: tuple[NonNegativeFloat, NonNegativeFloat] = (0.5, 1.0)
    """Gaussian blur sigma (0 = no blur)."""
    noise_std: float = Field(default=0.1, ge=0)
    """Noise with std U(0, n)."""


FusionPlace = Literal["enc4", "enc8", "enc16", "dec8", "dec4"]


class PriorsConfig(Section):
    scales: tuple[FusionPlace, ...] = ("enc4", "enc8", "enc16", "dec8", "dec4")
    """Where priors and features are fused: encoder at 4×, 8×, 16× and decoder at 8×, 4× (Table 4: single scale = enc16)."""
    direction: Literal["bidirectional", "unidirectional"] = "bidirectional"
    """Unidirectional: tokens read the features, the features stay unchanged (Table 4)."""
    modality: bool = True
    """Use modality tokens (Table 4)."""
    length: int = Field(default=10, ge=1)
    """Tokens per modality, l of the paper."""
    init_scale: float = Field(default=1.0, gt=0)
    """Initial task and null tokens are this many times as large as published. Larger ones help small models: with the published
    size all tasks of a dataset share one mask for hundreds of steps (docs/results/models.md)."""
    padding: Literal["masked", "attended"] | None = None
    """Padding columns: masked (a sample depends on itself alone), or one learned null token attended to, as published."""


class ModelConfig(Section):
    method: Literal["hermes", "traditional"] = "hermes"
    """`hermes` = priors and prototypes; `traditional` = the bare backbone with one output channel per task."""
    backbone: Literal["resunet", "medformer", "nnunet", "swinunetr"] = "resunet"
    """Backbone; `nnunet` and `swinunetr` are traditional only."""
    reading: Literal["paper", "published"] = "paper"
    """Preset that fills the fields left at null: see READINGS."""
    base_channels: int = Field(default=32, ge=8)
    """Channels of the first stage, a multiple of 8; the stages have 1, 2, 4, 8, 10 times as many."""
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (2, 2, 2, 2)
    """ResUNet: residual blocks of the four encoder stages (the decoder mirrors them)."""
    priors: PriorsConfig = PriorsConfig()
    """Context priors."""
    attention: Literal["fused", "reference"] = "fused"
    """Fused kernels, or the plain formula (for tests)."""


class LossConfig(Section):
    overlap: Literal["dice", "tversky"] | None = None
    """Overlap term: plain soft Dice (paper) or adaptive Tversky (published)."""
    modality_weight: float | None = Field(default=None, ge=0)
    """λ of the modality cross entropy: 0.001 (paper), 0.01 (published); 0 = without the auxiliary loss."""
    auxiliary_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of Hermes-M's auxiliary head; the main head has the rest."""


class OptimizerConfig(Section):
    name: Literal["lamb", "adamw"] = "lamb"
    """LAMB with whole-tensor trust ratios under every ZeRO stage, or AdamW."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the moving averages."""
    eps: float = Field(default=1e-5, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Decoupled weight decay. LAMB adds it to a tensor's update before the trust ratio is taken. At 0 no tensor has a trust ratio
    (all are 1, as in apex: a step is Adam's); a tensor that `decay_exclude` exempts has neither decay nor ratio at any value."""
    decay_exclude: Literal["none", "vectors"] = "none"
    """LAMB: tensors without weight decay, which then have trust ratio 1; `vectors` = biases and norms (published: none)."""
    max_trust_ratio: float | None = Field(default=None, gt=0)
    """LAMB: upper limit of the trust ratios (null = none, as published)."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm limit (0 = none)."""
    schedule: Literal["exponential", "polynomial", "constant"] | None = None
    """Decay after the warm-up: exponential (paper) or polynomial with power 0.9 (published)."""
    warmup_fraction: float = Field(default=0.025, ge=0, lt=1)
    """Share of the steps with the exponential-shaped warm-up (published: 5 of 200 epochs)."""
    final_lr_ratio: float = Field(default=0.01, gt=0, le=1)
    """Exponential schedule: last learning rate over the peak (the paper does not state its rate)."""


class EmaConfig(Section):
    enabled: bool = True
    """Keep an exponential moving average of the weights; evaluation and export use it."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """min(1 - 1/(step+1), decay), as published."""


class TrainConfig(Section):
    global_batch: int = Field(default=16, ge=1)
    """Samples per step over all ranks; step s consumes positions [s·B, (s+1)·B)."""
    micro_batch: int = Field(default=1, ge=1)
    """Samples per forward pass on a rank; the rest is accumulated."""
    max_steps: int = Field(default=80_000, ge=1)
    """Steps of the whole training (the schedule's length)."""
    precision: Precision = "fp32"
    """`bf16` keeps fp32 master weights; a device without bf16 arithmetic computes in fp32, and says so."""
    activation_checkpointing: Literal["none", "blocks", "full", "selective"] = "none"
    """What is recomputed in the backward pass."""
    offload_activations: bool = False
    """Keep the inputs of recomputed parts in host memory; needs a mode above, of `selective` the attention blocks only."""
    compile: bool = False
    """torch.compile of the attention blocks and token MLPs, at their first call; not with ZeRO stage 3."""
    ema: EmaConfig = EmaConfig()
    """Weight averaging."""
    initial_weights: str | None = None
    """Start from these weights: a run directory or a .safetensors file (transfer, incremental learning)."""
    initial_checkpoint: str | NonNegativeInt = "newest"
    """Which checkpoint of the run in `initial_weights`: `newest`, `best` (highest mean Dice during training) or a step."""
    trainable: Literal["all", "new_tasks"] = "all"
    """`new_tasks`: everything that `initial_weights` brings stays frozen; only the new tasks' tokens learn."""
    max_skipped: int = Field(default=20, ge=0)
    """Steps with NaN/Inf loss or gradient that are skipped before the run stops."""
    step_limit_s: float = Field(default=1800, gt=0)
    """Time limit of collectives; then stacks are dumped and the run stops."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=1000, ge=0)
    """Steps between checkpoints (0 = only the last)."""
    keep: int = Field(default=2, ge=1)
    """Newest complete checkpoints that are kept."""
    keep_every_hours: float | None = Field(default=None, gt=0)
    """Also keep one checkpoint per this many hours."""
    background: bool = True
    """Write from a snapshot while training goes on."""


class EvaluateConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations of `split` during training (0 = off)."""
    split: str = "val"
    """Split evaluated during training. The test split is evaluated only on request."""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Overlap of the sliding windows."""
    window_vox_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Sliding window (default: the training patch)."""
    window_weights: Literal["gaussian", "uniform"] = "gaussian"
    """How overlapping windows are averaged (published: uniform)."""
    window_batch: int = Field(default=1, ge=1)
    """Windows per forward pass."""
    empty_reference: Literal["count", "nnunet", "skip"] = "count"
    """A class absent from a reference: `count` = Dice 1 if the prediction is empty too, else 0; `nnunet` = left out / 0;
    `skip` = Hermes as published (left out, so false positives are free)."""
    nsd_tolerance_mm: float = Field(default=2.0, gt=0)
    """Tolerance of the normalised surface Dice."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples for 95 % confidence intervals (0 = none)."""
    max_cases: int | None = Field(default=None, ge=1)
    """Evaluate at most this many cases per dataset (null = all)."""


class MonitorConfig(Section):
    log_every: int = Field(default=10, ge=1)
    """Steps between lines on the terminal (metrics.jsonl has every step)."""
    prometheus_host: str = "127.0.0.1"
    """Address that the metrics endpoint binds to."""
    prometheus_port: int = Field(default=9400, ge=-1, le=65535)
    """First port; rank r listens at port + r. 0 = any free port, -1 = off."""
    pushgateway: str | None = Field(default=None, pattern=r"^(https?://)?(\[[\da-fA-F:.]+\]|[^\s/:@\[\]]+)(:\d{1,5})?(/\S*)?$")
    """Pushgateway for batch systems, `http://HOST:9091`."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""


class Config(Section):
    """The whole configuration: ten sections, `monitor`, and a verbatim `deepspeed` section for what is not stated here."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig = MonitorConfig()
    deepspeed: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    """Passed to DeepSpeed; keys that we state ourselves (batch, precision, optimizer, clipping) are refused here."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.output_dir) / self.run.name


READINGS: dict[str, dict[str, Any]] = {
    "paper": {
        "model.priors.padding": "masked",
        "loss.overlap": "dice",
        "loss.modality_weight": 0.001,
        "optimizer.schedule": "exponential",
    },
    "published": {
        "model.priors.padding": "attended",
        "loss.overlap": "tversky",
        "loss.modality_weight": 0.01,
        "optimizer.schedule": "polynomial",
    },
}
"""What each reading of Hermes sets where the user did not (facts: the paper's text against the released code)."""
