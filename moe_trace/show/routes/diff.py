"""Render two routings of the same tokens, or checkpoints against the last, as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.json import attributes
from moe_trace.data.display.tables import paragraph, printable, share
from moe_trace.data.layer_labels import layer_labels
from moe_trace.read.routes.compare.comparison import PositionOverlap, RoutesComparison

# The metrics are defined in `read/routes/compare/comparison.py`.
_LAYER, _OVERLAP = Column("layer", width=40), Column("overlap", terminal=share)
_CHANCE, _ANYWHERE = Column("by chance", terminal=share), Column("differ anywhere", terminal=share)
_SHARES = {"same_rank": "same rank", "differs": "differ", "reordered": "reordered", "begins": "begin here"}
_WEIGHT_COLUMNS = {
    "weights_l1": "weights L1",
    "margin_differing": "margin differ",
    "margin_same": "margin same",
}


def render_routes_diff(names: Sequence[str], found: RoutesComparison) -> str:
    """Render what differs, where the difference begins, and the metrics by layer and position."""
    parts = [
        "\n".join(f"{side}  {printable(name, 200)}" for side, name in zip("AB", names, strict=True)),
        paragraph(_headline(found)),
        _layer_table(found),
        *([_position_table(found)] if found.positions else []),
    ]
    return "\n\n".join(parts) + "\n"


def render_saturation(names: Sequence[str], found: Sequence[RoutesComparison]) -> str:
    """Render each file's overlap with the last, by layer."""
    layers = found[0].layers
    legend = "\n".join(f"{number}  {printable(name, 200)}" for number, name in enumerate(names, 1))
    title = f"Overlap with {len(names)}, of {found[0].tokens:,} tokens, matched by {found[0].aligned_by}."
    over_all: list[list[Cell]] = [
        [f"{number}", _mean(comparison), comparison.differing] for number, comparison in enumerate(found, 1)
    ]
    overall = text_table(["checkpoint", _OVERLAP, _ANYWHERE], over_all, title=title)
    headings = [_LAYER, _CHANCE, *(Column(f"{n}", terminal=share) for n in range(1, len(found) + 1))]
    rows: list[list[Cell]] = [
        [
            layer,
            found[0].top_k[i] / found[0].num_experts[i],
            *(float(comparison.overlap[i]) for comparison in found),
        ]
        for i, (layer, _) in enumerate(layer_labels(layers))
    ]
    by_layer = text_table(headings, rows, title="By layer; checkpoints in the order given.")
    return f"{legend}\n\n{overall}\n\n{by_layer}\n"


def plain_routes_diff(names: Sequence[str], found: RoutesComparison) -> dict[str, Any]:
    """Return all metrics by name."""
    figures = ("num_experts", "top_k", "compared", "overlap", *_SHARES, *_WEIGHT_COLUMNS)
    columns = attributes(found, *figures)
    layers = [
        {"layer": layer, **{name: None if c is None else c[place] for name, c in columns.items()}}
        for place, layer in enumerate(found.layers)
    ]
    begins = found.drift_begins
    return {
        **dict(zip("ab", names, strict=True)),
        **attributes(found, "tokens", "aligned_by", "only_a", "only_b", "differing", "identical"),
        "drift_begins": None if begins is None else found.layers[begins],
        "layers": layers,
        "positions": found.positions,
    }


def plain_saturation(names: Sequence[str], found: Sequence[RoutesComparison]) -> dict[str, Any]:
    """Return each file's overlap with the last, by layer."""
    return {
        "last": names[-1],
        "tokens": found[0].tokens,
        "layers": found[0].layers,
        "saturation": [
            {"file": name, "overlap": comparison.overlap, "differing": comparison.differing}
            for name, comparison in zip(names, found, strict=False)
        ],
    }


def _headline(found: RoutesComparison) -> str:
    sentences = [f"{found.tokens:,} tokens, matched by {found.aligned_by}."]
    if found.only_a or found.only_b:
        sentences.append(f"{found.only_a:,} are in A alone and {found.only_b:,} in B alone.")
    if found.drift_begins is None:
        sentences.append("Of no token do the experts differ.")
    else:
        first = int(found.begins.argmax())
        labels = [label for label, _ in layer_labels(found.layers)]
        sentences.append(
            f"The experts of {share(found.differing)} differ in some layer. Drift begins in "
            f"{labels[found.drift_begins]}; most tokens that differ do so first in "
            f"{labels[first]} ({share(float(found.begins[first]))} of all)."
        )
    sentences.append(f"{share(found.identical)} have the same experts at the same ranks in all layers.")
    return " ".join(sentences)


def _layer_table(found: RoutesComparison) -> str:
    columns = attributes(found, *_SHARES, *_WEIGHT_COLUMNS)
    known = {name: column for name, column in columns.items() if column is not None}
    headings = [Column(_SHARES[name], terminal=share) for name in _SHARES]
    headings += [Column(label) for name, label in _WEIGHT_COLUMNS.items() if name in known]
    rows: list[list[Cell]] = [
        [layer, float(overlap), top_k / experts, *(float(column[place]) for column in known.values())]
        for place, ((layer, _), overlap, top_k, experts) in enumerate(
            zip(layer_labels(found.layers), found.overlap, found.top_k, found.num_experts, strict=True)
        )
    ]
    return text_table([_LAYER, _OVERLAP, _CHANCE, *headings], rows)


def _position_table(found: RoutesComparison) -> str:
    rows: list[list[Cell]] = []
    for part in found.positions:
        span = f"{part.first}" if part.first == part.last else f"{part.first}-{part.last}"
        rows.append([span, part.tokens, _mean(part), part.differing])
    return text_table(
        ["positions", "tokens", _OVERLAP, _ANYWHERE], rows, title="By position, all layers together."
    )


def _mean(found: RoutesComparison | PositionOverlap) -> float | None:
    """Return the mean over layers, None if unknown."""
    known = found.overlap[np.isfinite(found.overlap)]
    return float(known.mean()) if len(known) else None
