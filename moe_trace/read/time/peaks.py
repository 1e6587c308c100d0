"""Peaks of devices, by their name in a trace's `deviceProperties`.

Dense (not sparse) bfloat16 tensor-core FLOP/s with float32 accumulation, and memory bandwidth, from the
vendors' data sheets: NVIDIA H100, H200, B200 (HGX), A100, L40S, L4, A10, V100 (float16: it has no bfloat16),
T4 (float16) tensor core GPU data sheets, the Ada and Ampere GeForce architecture white papers, and AMD's
MI250X, MI300X and MI325X data sheets. If a sheet gives the value with sparsity, half of it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HALF_TYPES = ("bfloat16", "float16")
BYTES_OF = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


def item_bytes(model: Mapping[str, Any]) -> int | None:
    """Return the size of the model's dtype in bytes, or None if unknown."""
    return BYTES_OF.get(str(model.get("dtype")))


def hidden_bytes(model: Mapping[str, Any]) -> int | None:
    """Return the bytes of a token's hidden state, or None if unknown."""
    width, item = model.get("hidden_size"), item_bytes(model)
    return width * item if isinstance(width, int) and item is not None else None


@dataclass(frozen=True)
class Peak:
    """Peak rates of a device; None if unknown."""

    flops_per_s: float | None
    bytes_per_s: float | None


@dataclass(frozen=True)
class PeakOverride:
    """Peaks given by the user, which override the table of devices."""

    tflops: float | None = None
    gb_per_s: float | None = None


# (part of the device's name, TFLOP/s of half types, GB/s); the first match counts.
_TABLE: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 8000.0),
    ("H200", 989.4, 4800.0),
    ("H100 PCIe", 756.0, 2000.0),
    ("H100 NVL", 835.0, 3900.0),
    ("H100", 989.4, 3350.0),
    ("A100-SXM4-40GB", 312.0, 1555.0),
    ("A100-PCIE-40GB", 312.0, 1555.0),
    ("A100", 312.0, 2039.0),
    ("L40S", 362.05, 864.0),
    ("L4", 121.0, 300.0),
    ("A10", 125.0, 600.0),
    ("V100", 125.0, 900.0),
    ("T4", 65.0, 320.0),
    ("RTX 4090", 165.2, 1008.0),
    ("RTX 3090", 71.0, 936.0),
    ("MI325X", 1307.4, 6000.0),
    ("MI300X", 1307.4, 5300.0),
    ("MI250X", 383.0, 3276.8),
)


def find_peak(devices: Sequence[str], dtype: str | None, better: PeakOverride) -> Peak:
    """Return the peak of a trace's device for a dtype.

    Args:
        devices: Names, all of one kind; the peaks of a mixed set are unknown.
        dtype: The model's dtype. Only half types are in the table, as a trace does not show whether
            float32 products may use TF32.
        better: Overrides the table.
    """
    known = {_lookup(device) for device in devices}
    tflops, gb_per_s = known.pop() if len(known) == 1 else (None, None)
    if dtype not in HALF_TYPES:
        tflops = None
    tflops = tflops if better.tflops is None else better.tflops
    gb_per_s = gb_per_s if better.gb_per_s is None else better.gb_per_s
    return Peak(
        flops_per_s=tflops * 1e12 if tflops is not None else None,
        bytes_per_s=gb_per_s * 1e9 if gb_per_s is not None else None,
    )


def _lookup(device: str) -> tuple[float | None, float | None]:
    if "Laptop" in device:  # laptops run at other clocks
        return None, None
    for part, flops, bandwidth in _TABLE:
        # Whole words: "L4" is not "L40", "A10" is not "A10G".
        if re.search(rf"(?:^|\s){re.escape(part)}(?:[\s-]|$)", device):
            return flops, bandwidth
    return None, None
