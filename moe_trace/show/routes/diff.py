"""Two routings of the same tokens, or checkpoints against the last, as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.json import attributes
from moe_trace.data.display.tables import paragraph, printable, share
from moe_trace.data.layer_labels import layer_labels
from moe_trace.read.routes.compare.comparison import RoutesComparison

_SHARE = "Share of the tokens that have an expert in either routing: "
LAYER = Column("layer", "Module path of the router.", width=40)
OVERLAP = Column(
    "overlap",
    "Mean over tokens of |A ∩ B| / k, the experts in both top-k sets: router saturation.",
    terminal=share,
)
UNIFORM = Column("by chance", "k / E: the overlap of two routings that choose uniformly.", terminal=share)
SAME_RANK = Column("same rank", "Mean over tokens of the ranks with the same expert, over k.", terminal=share)
DIFFERS = Column("differ", _SHARE + "those whose sets of experts differ.", terminal=share)
REORDERED = Column("reordered", _SHARE + "those with the same experts in another order.", terminal=share)
BEGINS = Column(
    "begin here", "Share of all tokens that differ in this layer and in none before it.", terminal=share
)
L1 = Column("weights L1", "Mean over tokens of the sum over experts of |weight in A - weight in B|.")
MARGIN_DIFFERING = Column(
    "margin differ",
    "Of the tokens that differ, the mean of the largest weight minus the second largest, in A.",
)
MARGIN_SAME = Column("margin same", "The same of the tokens that do not differ.")
POSITIONS = Column("positions", "Of the token in its sequence.")
TOKENS = Column("tokens", "Tokens at these positions.")
ANYWHERE = Column(
    "differ anywhere", "Share of these tokens whose experts differ in any layer.", terminal=share
)
FILE = Column("checkpoint", "Number of the file; each is compared with the last.")


def render_routes_diff(names: Sequence[str], found: RoutesComparison) -> str:
    """What differs, where it begins, and the figures by layer and position."""
    parts = [
        "\n".join(f"{side}  {printable(name, 200)}" for side, name in zip("AB", names, strict=True)),
        paragraph(_headline(found)),
        _layer_table(found),
    ]
    if found.positions:
        parts.append(_position_table(found))
    return "\n\n".join(parts) + "\n"


def render_saturation(names: Sequence[str], found: Sequence[RoutesComparison]) -> str:
    """Each file's overlap with the last, by layer."""
    layers = found[0].layers
    listed = "\n".join(f"{number}  {printable(name, 200)}" for number, name in enumerate(names, 1))
    title = f"Overlap with {len(names)}, of {found[0].tokens:,} tokens, matched by {found[0].aligned_by}."
    over_all: list[list[Cell]] = [
        [f"{number}", _mean(one.overlap.tolist()), one.differing] for number, one in enumerate(found, 1)
    ]
    overall = text_table([FILE, OVERLAP, ANYWHERE], over_all, title=title)
    headings = [LAYER, UNIFORM, *(Column(f"{n}", terminal=share) for n in range(1, len(found) + 1))]
    rows: list[list[Cell]] = [
        [layer, found[0].top_k[i] / found[0].num_experts[i], *(float(one.overlap[i]) for one in found)]
        for i, (layer, _) in enumerate(layer_labels(layers))
    ]
    by_layer = text_table(headings, rows, title="By layer; checkpoints in the order given.")
    return f"{listed}\n\n{overall}\n\n{by_layer}\n"


def plain_routes_diff(names: Sequence[str], found: RoutesComparison) -> dict[str, Any]:
    """All figures by name."""
    figures = ("compared", "overlap", "same_rank", "differs", "reordered", "begins")
    of_weights = ("weights_l1", "margin_differing", "margin_same")
    layers = [
        {
            "layer": layer,
            **{name: getattr(found, name)[place] for name in ("num_experts", "top_k", *figures)},
            **{name: None if (v := getattr(found, name)) is None else v[place] for name in of_weights},
        }
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
    """Each file's overlap with the last, by layer."""
    return {
        "last": names[-1],
        "tokens": found[0].tokens,
        "layers": found[0].layers,
        "saturation": [
            {"file": name, "overlap": one.overlap, "differing": one.differing}
            for name, one in zip(names, found, strict=False)
        ],
    }


def _headline(found: RoutesComparison) -> str:
    sentences = [f"{found.tokens:,} tokens, matched by {found.aligned_by}."]
    if found.only_a or found.only_b:
        sentences.append(f"{found.only_a:,} are in A alone and {found.only_b:,} in B alone.")
    if found.drift_begins is None:
        sentences.append("Of no token do the experts differ.")
    else:
        most = int(found.begins.argmax())
        labels = [label for label, _ in layer_labels(found.layers)]
        sentences.append(
            f"The experts of {share(found.differing)} differ in some layer. Drift begins in "
            f"{labels[found.drift_begins]}; most tokens that differ do so first in "
            f"{labels[most]} ({share(float(found.begins[most]))} of all)."
        )
    sentences.append(f"{share(found.identical)} have the same experts at the same ranks in all layers.")
    return " ".join(sentences)


def _layer_table(found: RoutesComparison) -> str:
    headings = [LAYER, OVERLAP, UNIFORM, SAME_RANK, DIFFERS, REORDERED, BEGINS]
    columns = [found.overlap, None, found.same_rank, found.differs, found.reordered, found.begins]
    for heading, column in (
        (L1, found.weights_l1),
        (MARGIN_DIFFERING, found.margin_differing),
        (MARGIN_SAME, found.margin_same),
    ):
        if column is not None:
            headings.append(heading)
            columns.append(column)
    rows: list[list[Cell]] = []
    for place, (layer, _) in enumerate(layer_labels(found.layers)):
        chance = found.top_k[place] / found.num_experts[place]
        rows.append([layer, *(chance if c is None else float(c[place]) for c in columns)])
    return text_table(headings, rows)


def _position_table(found: RoutesComparison) -> str:
    rows: list[list[Cell]] = []
    for part in found.positions:
        span = f"{part.first}" if part.first == part.last else f"{part.first}-{part.last}"
        rows.append([span, part.tokens, _mean(part.overlap.tolist()), part.differing])
    return text_table([POSITIONS, TOKENS, OVERLAP, ANYWHERE], rows, title="By position, all layers together.")


def _mean(values: Sequence[float]) -> float | None:
    told = [value for value in values if math.isfinite(value)]
    return sum(told) / len(told) if told else None
