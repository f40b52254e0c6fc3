"""What a Ray cluster is doing, asked every few seconds from a thread of its own, so that a slow answer holds up no step."""

from __future__ import annotations

import threading
from typing import Any

import ray
import ray._private.state as ray_state
import ray.core.generated.common_pb2 as common_messages
import ray.core.generated.gcs_pb2 as gcs_messages
from ray.exceptions import RayError

common_pb2: Any = common_messages
gcs_pb2: Any = gcs_messages
state: Any = ray_state.state  # Ray has no public count of workers without its dashboard

POLL_S = 5.0
CRASHES = (common_pb2.WorkerExitType.SYSTEM_ERROR, common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY)
"""How a worker ends that was killed or crashed; an idle one that Ray sends home ends otherwise."""


class ClusterGauges:
    """Polls the cluster that this process is connected to, until `stop`."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="ray-gauges", daemon=True)
        self._thread.start()

    def values(self) -> dict[str, float]:
        """The last answer by metric name; empty before the first."""
        return self._values

    def stop(self) -> None:
        """No more questions; waits for the one under way."""
        self._stop.set()
        self._thread.join(timeout=POLL_S)

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self._values = ask()
            except (RayError, RuntimeError, OSError):  # the head is gone or starting: no worker can be counted
                self._values = {**self._values, "hermes_ray_workers": 0.0}
            self._stop.wait(POLL_S)


def ask() -> dict[str, float]:
    """Workers alive, workers that crashed so far, object store in bytes; over the whole cluster. Needs a connection."""
    rows = [gcs_pb2.WorkerTableData.FromString(row) for row in state._connect_and_get_accessor().get_worker_table()]
    workers = [row for row in rows if row.worker_type == common_pb2.WORKER]
    limit, free = (table().get("object_store_memory", 0.0) for table in (ray.cluster_resources, ray.available_resources))
    return {
        "hermes_ray_workers": float(sum(row.is_alive for row in workers)),
        "hermes_ray_worker_restarts_total": float(sum(not row.is_alive and row.exit_type in CRASHES for row in workers)),
        "hermes_object_store_used_bytes": max(float(limit - free), 0.0),
        "hermes_object_store_limit_bytes": float(limit),
    }
