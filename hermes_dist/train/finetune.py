"""From a trained run to the configuration of a run that starts from its weights; the training itself is `trainer.train`.

transfer      all weights learn on the new stores; the new run answers the new stores' tasks
incremental   backbone, heads and old tokens stay frozen, the new tasks' tokens learn; the new run answers old and new tasks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hermes_dist.config import Config, load_config, resolve, set_dotted, validate
from hermes_dist.errors import ConfigError

Mode = Literal["transfer", "incremental"]


def finetune_config(source: Path, mode: Mode, *, stores: Sequence[str], name: str, overrides: Sequence[str] = ()) -> Config:
    """The source run's configuration with new stores and name, started from its weights.

    What names the old datasets (mixture weights, class weights) is dropped. Incremental runs have neither weight decay nor
    modality loss: both would pull on what is frozen. Overrides come last.

    Raises:
        ConfigError: the source is no run, the name is taken by it, or the stores were prepared differently.
    """
    old = load_config(source / "config.json")
    data = old.model_dump(mode="json")
    data["run"] |= {"name": name, "resume": "auto"}
    data["data"] |= {"stores": list(stores)}
    data["data"]["mixture"]["weights"] = None
    data["data"]["foreground"]["class_weights"] = {}
    data["train"] |= {"initial_weights": str(source), "trainable": "all" if mode == "transfer" else "new_tasks"}
    if mode == "incremental":
        data["optimizer"]["weight_decay"] = 0.0
        data["loss"]["modality_weight"] = 0.0
    for override in overrides:
        set_dotted(data, override)
    config = resolve(validate(data, source=f"fine-tuning {source}"))
    if config.run_dir.resolve() == source.resolve():
        raise ConfigError(f"the new run would be written over the one it starts from ({source}); choose another --name")
    return config


def check_preprocessing(source: Path, preprocessing: dict[str, Any]) -> None:
    """A frozen backbone must see what it was trained on. Raises ConfigError naming the settings that differ."""
    path = source / "preprocessing.json"
    if not path.is_file():
        return
    trained = json.loads(path.read_text())
    different = [key for key in trained if trained[key] != preprocessing.get(key)]
    if different:
        settings = ", ".join(f"{key} = {preprocessing.get(key)} (trained with {trained[key]})" for key in different)
        raise ConfigError(f"the stores were converted with other preprocessing than {source}: {settings}; convert them alike")
