"""Metadata of the model and the process that are stored in a trace."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moe_trace.data.version import __version__
from moe_trace.find.contracts.modules import class_name, unwrapped
from moe_trace.find.routers import RouterSite


def describe_model(model: nn.Module, sites: Sequence[RouterSite]) -> dict[str, Any]:
    """Return the name, class, sizes, dtype and device of the model inside wrappers such as DDP."""
    model = unwrapped(model)
    config = getattr(model, "config", None)
    layers, first = getattr(config, "num_hidden_layers", None), next(model.parameters(), None)
    return {
        "name": _name(model, str(getattr(config, "name_or_path", "") or "")),
        "class": class_name(model),
        "num_layers": layers if isinstance(layers, int) else 1 + max(site.layer for site in sites),
        "num_moe_layers": len({site.name for site in sites}),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
        "device": str(first.device) if first is not None else None,
        "hidden_size": getattr(config, "hidden_size", None),
        "experts_implementation": getattr(config, "_experts_implementation", None),
        "attention_implementation": getattr(config, "_attn_implementation", None),
        "training": model.training,
        "config": _config_values(config),
    }


_VALUE_LENGTH_MAX = 200
_EXCLUDED_KEYS = frozenset(
    ["transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype"]
)


def _config_values(config: Any) -> dict[str, Any]:
    """Return the plain values of a transformers config, nested ones as `part.key`, without long ones."""
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return {}
    try:
        values = to_dict()
    except Exception:  # a custom config must not break the recording
        return {}
    return dict(_flat(values)) if isinstance(values, dict) else {}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{key}.")
        elif key in _EXCLUDED_KEYS or len(str(value)) > _VALUE_LENGTH_MAX:
            continue
        elif value is None or isinstance(value, str | int | bool):
            yield f"{prefix}{key}", value
        elif isinstance(value, float):
            yield f"{prefix}{key}", value if math.isfinite(value) else str(value)
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", str(list(value))


def _name(model: nn.Module, name_or_path: str) -> str:
    """Return the hub id, the last part of a local path (a trace may be shared), or the class name."""
    if os.path.isdir(name_or_path):
        name_or_path = os.path.basename(os.path.abspath(name_or_path))
    return name_or_path or class_name(model)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and world size, or (0, 1) if torch.distributed is not initialized."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the contents of a trace."""
    found = {"moe_trace": __version__}
    for package in ("torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
