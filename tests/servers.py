"""Servers on loopback: a folder by HTTP, and an S3 endpoint."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.faults.range_server import RangeServer

SECRETS = ("SECRETID", "SECRETKEY")
"""The credentials of the S3 endpoint: they must appear in no output and in no object."""


@contextmanager
def serve(root: Path) -> Iterator[RangeServer]:
    """The folder by HTTP."""
    served = RangeServer(root)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The URL of an empty bucket; the environment holds its endpoint and credentials meanwhile."""
    name = f"shards-{uuid.uuid4().hex[:8]}"  # servers of one process share what they hold
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for variable in [n for n in os.environ if n.startswith("AWS_")]:
        patch.delenv(variable)
    patch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket=name)
    yield f"s3://{name}"
    patch.undo()
    server.stop()
