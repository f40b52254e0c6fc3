"""Models by method: `MODELS` is the registry, `build_model` the door."""

from collections.abc import Callable

from torch import nn

from hermes_dist.config import ModelConfig
from hermes_dist.errors import ConfigError
from hermes_dist.models.hermes import build_hermes
from hermes_dist.models.traditional import build_traditional
from hermes_dist.tasks import TaskTable

MODELS: dict[str, Callable[[ModelConfig, TaskTable], nn.Module]] = {
    "hermes": build_hermes,
    "traditional": build_traditional,
}


def build_model(config: ModelConfig, tasks: TaskTable) -> nn.Module:
    """The configured model for a task table: model(image, task_ids, modality_ids) -> ModelOutput.

    Raises:
        ConfigError: settings that do not go together, or a channel count that is not a multiple of 8.
    """
    if config.base_channels % 8:
        raise ConfigError(f"model.base_channels = {config.base_channels}: expected a multiple of 8")
    return MODELS[config.method](config, tasks)
