"""Short labels of layers, derived from the module paths of their routers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def layer_labels(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Return the (label, layer) of each path: `L03`, or `L03.text` if a layer has several routers."""
    layers = [_layer_index(path, default=i) for i, path in enumerate(paths)]
    crowded = {layer for layer, count in Counter(layers).items() if count > 1}
    labels = []
    for path, layer in zip(paths, layers, strict=True):
        label = f"L{layer:02d}"
        if layer in crowded:
            peers = [p for p, other in zip(paths, layers, strict=True) if other == layer and p != path]
            label += f".{_distinguishing_part(path, peers)}"
        labels.append((label, layer))
    return labels


def _layer_index(path: str, default: int) -> int:
    """Return the first number after `layers`, `blocks` and the like, else the first number of the path."""
    after_name = re.findall(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)(?=\.|$)", path)
    numbers = after_name or re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else default


def _distinguishing_part(path: str, peers: list[str]) -> str:
    """Return the shortest run of path components, from the first that differs, that no peer shares."""
    parts = path.split(".")
    others = [peer.split(".") for peer in peers]
    first = next((i for i in range(len(parts)) if any(parts[i : i + 1] != o[i : i + 1] for o in others)), 0)
    for end in range(first + 1, len(parts) + 1):
        if all(parts[first:end] != other[first:end] for other in others):
            return ".".join(part.removesuffix("_moe").removesuffix("_model") for part in parts[first:end])
    return path
