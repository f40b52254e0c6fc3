"""Devices and links: dense peak rates, memory, bandwidth, and a price to start from.

Peaks are the vendors' dense figures (no sparsity): `fp32` is what float32 training reaches with TF32 matrix units where the card
has them, since convolutions use them by default. Prices are round on-demand figures of 2025, to be replaced by your own.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch

from hermes_dist.config import Precision
from hermes_dist.errors import ConfigError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator: peaks in FLOP/s, memory in bytes, rates in bytes per second, price in US dollars per hour."""

    name: str
    peak_bf16: float
    peak_fp32: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    usd_per_hour: float

    def peak(self, precision: Precision) -> float:
        """Dense peak in FLOP/s for a training precision."""
        return self.peak_bf16 if precision == "bf16" else self.peak_fp32


GIB = 2**30
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # name, bf16, TF32 or fp32, memory, HBM bandwidth, link inside a node per direction (NVLink or PCIe), $/h
        Device("A100-40G", 312e12, 156e12, 40 * GIB, 1.555e12, 300e9, 1.3),
        Device("A100-80G", 312e12, 156e12, 80 * GIB, 2.039e12, 300e9, 1.8),
        Device("H100", 989e12, 495e12, 80 * GIB, 3.35e12, 450e9, 3.0),
        Device("H200", 989e12, 495e12, 141 * GIB, 4.8e12, 450e9, 3.8),
        Device("B200", 2250e12, 1125e12, 180 * GIB, 8.0e12, 900e9, 6.0),
        Device("V100-32G", 15.7e12, 15.7e12, 32 * GIB, 0.9e12, 150e9, 0.9),
        Device("L40S", 362e12, 183e12, 48 * GIB, 0.864e12, 32e9, 1.2),
        Device("RTX3090", 71e12, 35.6e12, 24 * GIB, 0.936e12, 32e9, 0.25),
        Device("RTX4090", 165e12, 82.6e12, 24 * GIB, 1.008e12, 32e9, 0.4),
        Device("RTX5090", 209e12, 104.8e12, 32 * GIB, 1.792e12, 64e9, 0.6),
    )
}
"""By name. V100 has no bf16 units: bf16 runs at the float32 rate there."""

LINKS: dict[str, float] = {"25GbE": 3.1e9, "100GbE": 12.5e9, "IB-HDR": 25e9, "IB-NDR": 50e9, "IB-NDRx8": 400e9}
"""Bytes per second and direction between two nodes, per node."""


def find_device(name: str, usd_per_hour: float | None = None) -> Device:
    """A device of the table, at your own price if you give one. Raises ConfigError naming the nearest one."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not in the table ({', '.join(DEVICES)}).{nearest(name, list(DEVICES))}")
    return DEVICES[name] if usd_per_hour is None else replace(DEVICES[name], usd_per_hour=usd_per_hour)


def peak_of(device_name: str, precision: Precision) -> float | None:
    """Peak of the device that a driver names, e.g. `NVIDIA H100 80GB HBM3`; None if the table has none like it."""
    text = device_name.upper().replace(" ", "")
    families = sorted(DEVICES.values(), key=lambda d: (-len(d.name.split("-")[0]), -d.memory_bytes))
    for device in families:
        if device.name.split("-")[0] in text:
            return device.peak(precision)
    return None


def measured_peak(seconds: float = 0.3, side: int = 512) -> float:
    """FLOP/s of a float32 matrix product on this CPU with torch's present number of threads: the peak that MFU refers to."""
    a, b = torch.ones(side, side), torch.ones(side, side)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
