"""What a reader of a trace wants to know of the model and the process that wrote it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_trace.data.version import __version__
from moe_trace.find.contracts.forms import class_name, unwrapped
from moe_trace.find.routers import RouterSite


def describe_model(model: nn.Module, sites: Sequence[RouterSite]) -> dict[str, Any]:
    """Name, class, sizes, type and device of the model, seen through DDP and the like."""
    model = unwrapped(model)
    config = getattr(model, "config", None)
    first = next(model.parameters(), None)
    return {
        "name": _name(model, str(getattr(config, "name_or_path", "") or "")),
        "class": class_name(model),
        "num_layers": _num_layers(config, sites),
        "num_moe_layers": len({site.name for site in sites}),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
        "device": str(first.device) if first is not None else None,
        "hidden_size": getattr(config, "hidden_size", None),
        "experts_implementation": getattr(config, "_experts_implementation", None),
    }


def _name(model: nn.Module, name_or_path: str) -> str:
    """The hub id; the last part of a local path, since a trace travels; else the class."""
    if os.path.isdir(name_or_path):
        name_or_path = os.path.basename(os.path.abspath(name_or_path))
    return name_or_path or class_name(model)


def _num_layers(config: Any, sites: Sequence[RouterSite]) -> int:
    layers = getattr(config, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else 1 + max(site.layer for site in sites)


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) where torch.distributed is not initialised."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is in the trace."""
    found = {"moe_trace": __version__}
    for package in ("torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
