"""From a trained run to the configuration of a run that starts from its weights; the training itself is `trainer.train`.

transfer      all weights learn on the new stores; the new run answers the new stores' tasks
incremental   backbone, heads and old tokens stay frozen, the new tasks' tokens learn; the new run answers old and new tasks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hermes_dist.config import Config, OptimizerConfig, load_config, resolve, set_dotted, validate
from hermes_dist.errors import ConfigError

Mode = Literal["transfer", "incremental"]


def finetune_config(
    source: Path,
    mode: Mode,
    *,
    stores: Sequence[str],
    name: str,
    checkpoint: str = "newest",
    overrides: Sequence[str] = (),
) -> Config:
    """The source run's configuration with new stores and name, started from its weights: those of `checkpoint`.

    What names the old datasets (mixture weights, class weights) is dropped. Incremental runs have neither weight decay nor
    modality loss: both would pull on what is frozen. Overrides come last.

    Raises:
        ConfigError: the source is no run, the name is taken by it, or the stores were prepared differently.
    """
    old = load_config(source / "config.json")
    data = old.model_dump(mode="json")
    # Beside the source, wherever that lies now: it may have been moved or copied since it was trained.
    beside = source.parent if source.name not in ("", "..") else source.resolve().parent
    data["run"] |= {"name": name, "output_dir": str(beside), "resume": "auto"}
    data["data"] |= {"stores": list(stores)}
    data["data"]["mixture"]["weights"] = None
    data["data"]["foreground"]["class_weights"] = {}
    data["train"] |= {"initial_weights": str(source), "trainable": "all" if mode == "transfer" else "new_tasks"}
    data["train"]["initial_checkpoint"] = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    if mode == "incremental":
        data["optimizer"]["weight_decay"] = 0.0
        data["loss"]["modality_weight"] = 0.0
    elif old.train.trainable == "new_tasks":  # its zeros were for frozen weights; without decay LAMB has no trust ratios
        data["optimizer"]["weight_decay"] = OptimizerConfig().weight_decay
        data["loss"]["modality_weight"] = None
    for override in overrides:
        set_dotted(data, override)
    config = resolve(validate(data, source=f"fine-tuning {source}"))
    if config.run_dir.resolve() == source.resolve():
        raise ConfigError(f"the new run would be written over the one it starts from ({source}); choose another --name")
    return config
