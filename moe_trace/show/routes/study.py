"""A study of routes as text: a table for each analysis, a line for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.tables import fixed, paragraph, printable, share
from moe_trace.read.routes.specialisation import OFTEN
from moe_trace.read.routes.study import LayerStudy, RoutesStudy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SEGMENT_SHOWN = 0


def render_study_text(study: RoutesStudy) -> str:
    """All that could be found, and what could not be and why."""
    parts = [_header(study), *_tables(study), *_unknown(study)]
    for number, group in enumerate(study.others, start=2):
        parts += [paragraph(f"Layers that saw other tokens, group {number}"), _header(group), *_tables(group)]
    return "\n\n".join(parts) + "\n"


def layer_label(path: str) -> str:
    """`L03` of a module path with one number in it; the path itself otherwise."""
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
    made = (_load, _locality, _next_layer, _together, _distinct, _domains, _vocabulary, _gates, _saturation)
    return [text for text in (make(study) for make in made) if text]


def _shares(*labels: str) -> list[str | Column]:
    return [Column(label, terminal=share) for label in labels]


def _by_layer(
    study: RoutesStudy, headings: Sequence[str | Column], row: Callable[[LayerStudy], Row | None], title: str
) -> str:
    rows = []
    for layer in study.layers:
        found = row(layer)
        if found is not None:
            rows.append((layer_label(layer.layer), *found))
    return text_table(("layer", *headings), rows, title=title) if rows else ""


def _load(study: RoutesStudy) -> str:
    def row(layer: LayerStudy) -> Row:
        busiest = int(layer.counts.argmax()) if layer.counts.any() else None
        return (
            layer.num_experts,
            layer.top_k,
            layer.tokens,
            layer.skipped,
            layer.load.max_over_mean,
            layer.load.cv,
            busiest,
        )

    headings = ("experts", "top k", "tokens", "skipped", "max÷mean", "CV", "busiest expert")
    return _by_layer(study, headings, row, "Load (max÷mean and CV: padding included, as in a report)")


def _locality(study: RoutesStudy) -> str:
    def row(layer: LayerStudy) -> Row | None:
        found = layer.locality
        if found is None:
            return None
        within = dict(zip(found.distances.tolist(), found.reuse_within.tolist(), strict=True))
        covered = found.segment_coverage[_SEGMENT_SHOWN][min(2 * layer.top_k, layer.num_experts) - 1]
        values = (found.consecutive, found.by_load, found.by_chance, within.get(16), found.first_use, covered)
        return values

    headings = _shares("next token", "by load", "by chance", "within 16", "first use", "2k of segment")
    return _by_layer(
        study,
        headings,
        row,
        "Reuse within a sequence: share of a token's experts that the token before it used (next token), "
        "what the load alone and uniform routing give, share used in the last 16 tokens, share never used "
        "before, and the share of 16 consecutive tokens' assignments that their own 2k most used experts "
        "cover",
    )


def _next_layer(study: RoutesStudy) -> str:
    def row(layer: LayerStudy) -> Row | None:
        found = layer.transition
        if found is None or not found.tokens_asked:
            return None
        return found.recall, found.recall_by_load, found.tokens_asked

    return _by_layer(
        study,
        [*_shares("recall", "by load"), "tokens asked"],
        row,
        "How well a layer's experts predict those of the next layer: share of its experts among the k most "
        "likely, on tokens that the transitions were not counted on; by load: its k most used experts",
    )


def _together(study: RoutesStudy) -> str:
    def row(layer: LayerStudy) -> Row | None:
        pairs = layer.coactivation.strongest(3)
        return (
            (*(f"{i} → {j}  {share(p)}" for i, j, p in pairs), *[None] * (3 - len(pairs))) if pairs else None
        )

    which = "all pairs of a token" if study.pairs == "all" else "neighbouring ranks"
    title = f"Co-activation, {which}: the strongest i → j, share of the tokens with expert i that have j, too"
    return _by_layer(study, ("first", "second", "third"), row, title)


def _distinct(study: RoutesStudy) -> str:
    most = max((len(layer.distinct.expected) for layer in study.layers), default=0)
    batches = [batch for batch in BATCHES if batch <= most]

    def row(layer: LayerStudy) -> Row:
        expected = layer.distinct.expected
        return tuple(float(expected[b - 1]) if b <= len(expected) else None for b in batches)

    one = partial(fixed, decimals=1)
    drawn = _by_layer(
        study,
        [Column(str(batch), terminal=one) for batch in batches],
        row,
        "Distinct experts of a step, by its number of tokens, for tokens drawn from the file at random",
    )
    return "\n\n".join(part for part in (drawn, _measured(study)) if part)


def _measured(study: RoutesStudy) -> str:
    """Recorded decode steps: the sizes with the most steps."""
    steps: dict[int, int] = {}
    for layer in study.layers:
        for batch, number in zip(layer.distinct.batch_sizes, layer.distinct.steps, strict=True):
            steps[int(batch)] = max(steps.get(int(batch), 0), int(number))
    sizes = sorted(sorted(steps, key=lambda size: -steps[size])[:8])

    def row(layer: LayerStudy) -> Row:
        found = dict(zip(layer.distinct.batch_sizes.tolist(), layer.distinct.measured.tolist(), strict=True))
        return tuple(found.get(size) for size in sizes)

    one = partial(fixed, decimals=1)
    headings = [Column(str(size), terminal=one) for size in sizes]
    title = "The same of the recorded decode steps"
    return _by_layer(study, headings, row, title) if sizes else ""


def _domains(study: RoutesStudy) -> str:
    rows: list[Row] = []
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
            rows.append((layer_label(layer.layer), label, expert, *values))
    title = (
        "Domains: the expert that stands out most, in what share of the domain's tokens and of the others'"
    )
    headings = ["layer", "domain", "expert", *_shares("of its tokens", "of others'", "uniform")]
    return text_table(headings, rows, left=2, title=title) if rows else ""


def _vocabulary(study: RoutesStudy) -> str:
    rows: list[Row] = []
    for layer in study.layers:
        for kind, found in layer.vocabulary.items():
            means = (found.mean, found.mean_often, found.mean_first)
            rows.append((layer_label(layer.layer), kind, found.ids, *means))
    title = (
        "Vocabulary: mean over token ids of the largest share of their occurrences that one expert of the "
        f"top k got; over ids with {OFTEN} occurrences or more; and in the first slot alone"
    )
    headings = ["layer", "ids", "different", *_shares("top k", "frequent ids", "first slot")]
    return text_table(headings, rows, left=2, title=title) if rows else ""


def _gates(study: RoutesStudy) -> str:
    def row(layer: LayerStudy) -> Row | None:
        found = layer.gates
        if found is None:
            return None
        ratio = found.mass_share / np.where(found.assignment_share > 0, found.assignment_share, np.nan)
        if np.isnan(ratio).all():
            return None
        heavy, light = int(np.nanargmax(ratio)), int(np.nanargmin(ratio))
        ends = (f"{expert}  {ratio[expert]:.2f}×" for expert in (heavy, light))
        return (*ends, *map(float, (found.margin[2], found.margin[0], found.last[2])))

    three = partial(fixed, decimals=3)
    middle = [Column(label, terminal=three) for label in ("margin p50", "margin p5")]
    return _by_layer(
        study,
        ("heaviest", "lightest", *middle, *_shares("last p50")),
        row,
        "Gating weights: the experts with the most and the least mass for their assignments; a token's "
        "largest weight minus its second; its smallest over their sum",
    )


def _saturation(study: RoutesStudy) -> str:
    found = study.saturation
    if found is None:
        return ""
    rows: list[Row] = [
        (layer_label(layer.layer), *found.top_k[:, number].tolist(), float(found.uniform[number]))
        for number, layer in enumerate(study.layers)
    ]
    headings = ["layer", *_shares(*(printable(label, 16) for label in found.labels), "uniform")]
    title = "Saturation: share of the last file's experts of a token that each file chose for it, too"
    return text_table(headings, rows, title=title)


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
