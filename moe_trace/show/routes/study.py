"""Render a study of routes as text, with a table per analysis and a row per layer, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.json import json_text
from moe_trace.data.display.tables import fixed, paragraph, printable, share
from moe_trace.read.routes.specialisation import OFTEN
from moe_trace.read.routes.study import LayerStudy, RoutesStudy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SEGMENT_SHOWN = 0


def render_study_text(study: RoutesStudy) -> str:
    """Render all results, then what is unknown and why."""
    parts = [_header(study), *_tables(study), *_unknown(study)]
    for number, group in enumerate(study.others, start=2):
        parts += [paragraph(f"Layers that saw other tokens, group {number}"), _header(group), *_tables(group)]
    return "\n\n".join(parts) + "\n"


def layer_label(path: str) -> str:
    """Return a label such as `L03` for a module path with one number in it, otherwise the path itself."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return f"L{int(numbers[0]):02d}" if len(numbers) == 1 else path


def _header(study: RoutesStudy) -> str:
    left_out = [f"{n:,} {what}" for n, what in ((study.padding, "padding"), (study.recomputed, "recomputed"))]
    files = ", ".join(printable(label, 60) for label in study.labels)
    lines = [f"Routes of {files}: {study.rows:,} tokens ({', '.join(left_out)}, left out below)."]
    if study.saturation is not None:
        lines.append("The files hold the same tokens: all but saturation is of the last one.")
    return paragraph(" ".join(lines))


Row = tuple[Cell, ...]


def _tables(study: RoutesStudy) -> list[str]:
    renderers = (
        _load,
        _locality,
        _next_layer,
        _coactivation_table,
        _distinct,
        _measured,
        _domains,
        _vocabulary,
        _gates,
    )
    return [text for text in (make(study) for make in (*renderers, _saturation)) if text]


def _shares(*labels: str) -> list[str | Column]:
    return [Column(label, terminal=share) for label in labels]


def _fixed_columns(decimals: int, *labels: object) -> list[str | Column]:
    return [Column(str(label), terminal=partial(fixed, decimals=decimals)) for label in labels]


def _table(
    headings: Sequence[str | Column], rows: Iterable[tuple[LayerStudy, Row]], title: str, left: int = 1
) -> str:
    labelled = [(layer_label(layer.layer), *row) for layer, row in rows]
    return text_table(("layer", *headings), labelled, left=left, title=title) if labelled else ""


def _load(study: RoutesStudy) -> str:
    headings = ("experts", "top k", "tokens", "skipped", "max÷mean", "CV", "busiest expert")
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        busiest = int(layer.counts.argmax()) if layer.counts.any() else None
        sizes = (layer.num_experts, layer.top_k, layer.tokens, layer.skipped)
        rows.append((layer, (*sizes, layer.load.max_over_mean, layer.load.cv, busiest)))
    return _table(headings, rows, "Load (max÷mean and CV: padding included, as in a report)")


def _locality(study: RoutesStudy) -> str:
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        found = layer.locality
        if found is None:
            continue
        within = dict(zip(found.distances.tolist(), found.reuse_within.tolist(), strict=True)).get(16)
        covered = float(found.segment_coverage[_SEGMENT_SHOWN][min(2 * layer.top_k, layer.num_experts) - 1])
        chance = (found.consecutive, found.by_load, found.by_chance)
        rows.append((layer, (*chance, within, found.first_use, covered)))
    return _table(
        _shares("next token", "by load", "by chance", "within 16", "first use", "2k of segment"),
        rows,
        "Reuse within a sequence: share of a token's experts that the token before it used (next token), "
        "what the load alone and uniform routing give, share used in the last 16 tokens, share never used "
        "before, and the share of 16 consecutive tokens' assignments that their own 2k most used experts "
        "cover",
    )


def _next_layer(study: RoutesStudy) -> str:
    pairs = [(layer, layer.transition) for layer in study.layers]
    return _table(
        [*_shares("recall", "by load"), "tokens asked"],
        [
            (layer, (found.recall, found.recall_by_load, found.tokens_asked))
            for layer, found in pairs
            if found is not None and found.tokens_asked
        ],
        "How well a layer's experts predict those of the next layer: share of its experts among the k most "
        "likely, on tokens that the transitions were not counted on; by load: its k most used experts",
    )


def _coactivation_table(study: RoutesStudy) -> str:
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        pairs = [f"{i} → {j}  {share(p)}" for i, j, p in layer.coactivation.strongest(3)]
        if pairs:
            rows.append((layer, (*pairs, *[None] * (3 - len(pairs)))))
    which = "all pairs of a token" if study.pairs == "all" else "neighbouring ranks"
    title = f"Co-activation, {which}: the strongest i → j, share of the tokens with expert i that have j, too"
    return _table(("first", "second", "third"), rows, title)


def _distinct(study: RoutesStudy) -> str:
    longest = max((len(layer.distinct.expected) for layer in study.layers), default=0)
    batches = [batch for batch in BATCHES if batch <= longest]
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        expected = layer.distinct.expected.tolist()
        rows.append((layer, tuple(expected[b - 1] if b <= len(expected) else None for b in batches)))
    title = "Distinct experts of a step, by its number of tokens, for tokens drawn from the file at random"
    return _table(_fixed_columns(1, *batches), rows, title)


def _measured(study: RoutesStudy) -> str:
    """Render the recorded decode steps, for the batch sizes with the most steps."""
    steps: dict[int, int] = {}
    rows: list[tuple[LayerStudy, Row]] = []
    found = [layer.distinct for layer in study.layers]
    for distinct in found:
        for batch, number in zip(distinct.batch_sizes.tolist(), distinct.steps.tolist(), strict=True):
            steps[batch] = max(steps.get(batch, 0), number)
    sizes = sorted(sorted(steps, key=lambda size: -steps[size])[:8])
    for layer, distinct in zip(study.layers, found, strict=True):
        used = dict(zip(distinct.batch_sizes.tolist(), distinct.measured.tolist(), strict=True))
        rows.append((layer, tuple(used.get(size) for size in sizes)))
    return _table(_fixed_columns(1, *sizes), rows, "The same of the recorded decode steps") if sizes else ""


def _domains(study: RoutesStudy) -> str:
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        if layer.domains is None:
            continue
        shares = layer.domains.share
        for domain, label in enumerate(study.labels):
            if np.isnan(shares[domain]).any():
                continue
            others = np.nanmean(np.delete(shares, domain, axis=0), axis=0)
            expert = int(np.argmax(shares[domain] - others))
            values = (float(shares[domain, expert]), float(others[expert]), layer.domains.uniform)
            rows.append((layer, (label, expert, *values)))
    headings = ["domain", "expert", *_shares("of its tokens", "of others'", "uniform")]
    title = (
        "Domains: the expert that stands out most, in what share of the domain's tokens and of the others'"
    )
    return _table(headings, rows, title, left=2)


def _vocabulary(study: RoutesStudy) -> str:
    rows: list[tuple[LayerStudy, Row]] = [
        (layer, (kind, found.ids, found.mean, found.mean_often, found.mean_first))
        for layer in study.layers
        for kind, found in layer.vocabulary.items()
    ]
    title = (
        "Vocabulary: mean over token ids of the largest share of their occurrences that one expert of the "
        f"top k got; over ids with {OFTEN} occurrences or more; and in the first slot alone"
    )
    headings = ["ids", "different", *_shares("top k", "frequent ids", "first slot")]
    return _table(headings, rows, title, left=2)


def _gates(study: RoutesStudy) -> str:
    rows: list[tuple[LayerStudy, Row]] = []
    for layer in study.layers:
        found = layer.gates
        if found is None:
            continue
        ratio = found.mass_share / np.where(found.assignment_share > 0, found.assignment_share, np.nan)
        if np.isnan(ratio).all():
            continue
        heavy, light = int(np.nanargmax(ratio)), int(np.nanargmin(ratio))
        ends = (f"{expert}  {ratio[expert]:.2f}×" for expert in (heavy, light))
        rows.append((layer, (*ends, *map(float, (found.margin[2], found.margin[0], found.last[2])))))
    return _table(
        ["heaviest", "lightest", *_fixed_columns(3, "margin p50", "margin p5"), *_shares("last p50")],
        rows,
        "Gating weights: the experts with the most and the least mass for their assignments; a token's "
        "largest weight minus its second; its smallest over their sum",
    )


def _saturation(study: RoutesStudy) -> str:
    found = study.saturation
    if found is None:
        return ""
    rows: list[tuple[LayerStudy, Row]] = [
        (layer, (*found.top_k[:, number].tolist(), float(found.uniform[number])))
        for number, layer in enumerate(study.layers)
    ]
    title = "Saturation: share of the last file's experts of a token that each file chose for it, too"
    return _table(_shares(*(printable(label, 16) for label in found.labels), "uniform"), rows, title)


def _unknown(study: RoutesStudy) -> list[str]:
    notes = []
    if study.unknown:
        notes.append(f"Sequence or position of {study.unknown:,} tokens is unknown: reuse leaves them out.")
    if not any(layer.vocabulary for layer in study.layers):
        notes.append("Token ids were not recorded: what experts specialise in words is unknown.")
    if not any(layer.gates for layer in study.layers):
        notes.append("Gating weights were not recorded: mass and margin are unknown.")
    else:
        notes.append("How far the k-th expert was from the first that was not chosen is unknown.")
    return [paragraph(note) for note in notes]


_PAIRS = 20


def render_study_json(study: RoutesStudy, *, matrices: bool = False) -> str:
    """Return indented JSON text; NaN is null.

    Args:
        matrices: include the [E, E] counts of co-activation and transitions, which grow with E squared.
    """
    return json_text(_group(study, matrices))


def _group(study: RoutesStudy, matrices: bool) -> dict[str, Any]:
    layers = [_layer(layer, matrices) for layer in study.layers]
    return {**vars(study), "layers": layers, "others": [_group(other, matrices) for other in study.others]}


def _layer(layer: LayerStudy, matrices: bool) -> dict[str, Any]:
    pairs = layer.coactivation.strongest(_PAIRS)
    entries: dict[str, Any] = {"strongest": [{"i": i, "j": j, "probability": p} for i, j, p in pairs]}
    transition = None if layer.transition is None else dict(vars(layer.transition))
    if matrices:
        entries["together"] = layer.coactivation.together
    elif transition is not None:
        del transition["counts"]
    return {**vars(layer), "coactivation": entries, "transition": transition}
