"""The registry of formats on disk; `hermes_dist.shards.store` opens and creates stores."""

from __future__ import annotations

from hermes_dist.shards.layout import CaseFormat
from hermes_dist.shards.tar_store import TarFormat
from hermes_dist.shards.zarr_store import ZarrFormat

STORES: dict[str, CaseFormat] = {"zarr": ZarrFormat(), "webdataset": TarFormat()}
