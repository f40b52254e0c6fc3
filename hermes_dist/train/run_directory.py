"""The run directory: opened before the first step, so that a mistake shows at once and nothing is half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError, StoreError
from hermes_dist.shards.collection import DIGESTS_FILE, joined_digest, recorded_digests
from hermes_dist.shards.store import ShardStore, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.train.environment import describe_environment
from hermes_dist.volume.preprocess import Preprocessing


def open_stores(config: Config) -> tuple[list[ShardStore], TaskTable, Preprocessing]:
    """Open every store of `data.stores` and join their task tables.

    Raises:
        ConfigError: no store is named.
        StoreError: a store is missing, or two were converted with different preprocessing.
    """
    if not config.data.stores:
        raise ConfigError("data.stores is empty: name at least one shard store, as made by `hermes-shard convert SRC --out URL`")
    stores = [open_store(url, config.stream.cache_dir, config.stream.cache_mib) for url in config.data.stores]
    first = stores[0].collection.preprocessing
    for url, store in zip(config.data.stores, stores, strict=True):
        if store.collection.preprocessing != first:
            raise StoreError(
                f"{url}: converted with other preprocessing than {config.data.stores[0]}; "
                "convert both with the same settings (`hermes-shard info URL` shows them)"
            )
    return stores, TaskTable.merge([s.collection.tasks for s in stores]), first


def collection_digest(stores: Sequence[ShardStore]) -> str:
    """Content hash over all stores, in order: a resumed run must read the same data."""
    return joined_digest([store.collection for store in stores])


def prepare(config: Config, tasks: TaskTable, preprocessing: Preprocessing, world_size: int, digest: str) -> Path:
    """Create the run directory and write what describes the run; `digest` of its stores. Called on one rank only.

    Raises:
        ConfigError: `run.resume=never` although the directory holds a run already.
    """
    run_dir = config.run_dir
    if config.run.resume == "never" and (run_dir / "config.json").exists():
        raise ConfigError(
            f"{run_dir} holds a run already and run.resume=never; choose another run.name, remove it, or use run.resume=auto"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config.model_dump(mode="json"))
    write_json(run_dir / "environment.json", describe_environment(world_size))
    write_json(run_dir / "tasks.json", tasks.to_json())
    write_json(run_dir / "preprocessing.json", preprocessing.model_dump(mode="json"))
    digests = recorded_digests(run_dir)
    write_json(run_dir / DIGESTS_FILE, {"digests": digests if digest in digests else [*digests, digest]})
    return run_dir


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is either the old one or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
