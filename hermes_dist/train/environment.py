"""What a run was made with: versions, commit, hardware. Written once as `environment.json` beside its results."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

PACKAGES = (
    "hermes-dist",
    "torch",
    "deepspeed",
    "ray",
    "zarr",
    "numcodecs",
    "tensorstore",
    "webdataset",
    "pyarrow",
    "numpy",
    "monai",
)


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, git commit (with `+changes` if the tree is dirty), processor, threads of this rank, memory in GiB, GPUs."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, with `+changes` if the tree is dirty; None outside a checkout."""
    folder = os.path.dirname(__file__)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
