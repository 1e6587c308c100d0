"""Render a simulated cache as text and JSON."""

from __future__ import annotations

from functools import partial
from typing import Any

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.json import attributes, json_text
from moe_trace.data.display.tables import fixed, paragraph, scaled, share
from moe_trace.read.routes.cache import CacheResult, CacheStudy
from moe_trace.show.routes.study import layer_label


def render_cache_text(study: CacheStudy, *, every_layer: bool = False) -> str:
    """Render a line per policy and size; with `every_layer`, also the hit rates of the layers."""
    parts = [_header(study)]
    known = study.expert_bytes is not None
    rows: list[tuple[Cell, ...]] = []
    for result in study.results:
        moved = (result.loads_per_token, *((result.bytes_per_token,) if known else ()))
        rows.append((result.policy, result.experts_in_memory, result.hit_rate, *moved))
    headings: list[str | Column] = ["policy", "in memory", Column("hit rate", terminal=share)]
    headings += [Column("loads a token", terminal=partial(fixed, decimals=2))]
    headings += [Column("bytes a token", terminal=partial(scaled, unit="B"))] if known else []
    parts.append(text_table(headings, rows))
    fetched = [result for result in study.results if result.prefetch is not None]
    parts += [_prefetch(fetched)] if fetched else []
    parts += [_layers(study)] if every_layer else []
    if study.expert_bytes is None:
        parts.append(paragraph("Bytes are unknown: --expert-bytes says how large one expert's weights are."))
    else:
        parts.append(paragraph(f"One expert's weights: {scaled(study.expert_bytes, 'B')}."))
    return "\n\n".join(parts) + "\n"


def _header(study: CacheStudy) -> str:
    step = "a forward's tokens together" if study.together == "forward" else "each token by itself"
    memory = "one memory for all layers" if study.shared else "a memory for each layer"
    extent = f"{study.steps:,} steps, {study.tokens:,} tokens"
    if study.steps < study.steps_recorded:
        part = share(study.steps / study.steps_recorded)
        extent = (
            f"the first {study.steps:,} of {study.steps_recorded:,} steps ({part}), {study.tokens:,} tokens"
        )
    return paragraph(
        f"Experts in memory, simulated: {memory}, {extent}, {step}. In memory: experts of a layer. Belady "
        "knows the future: no policy has more hits."
    )


def _prefetch(results: list[CacheResult]) -> str:
    rows = [
        (
            *(result.policy, result.experts_in_memory),
            *(ahead.hit_rate_without, ahead.hit_rate, ahead.precision),
        )
        for result in results
        if (ahead := result.prefetch) is not None
    ]
    names = ("hit rate without", "with", "precision")
    return text_table(
        ("policy", "in memory", *(Column(name, terminal=share) for name in names)),
        rows,
        title="Prefetching by transition from the layer before, over the second half of the steps; "
        "precision: share of what was loaded ahead that was needed",
    )


def _layers(study: CacheStudy) -> str:
    headings = [Column(f"{r.policy} {r.experts_in_memory}", terminal=share) for r in study.results]
    rows: list[tuple[Cell, ...]] = [
        (layer_label(path), *(float(r.layer_hit_rates[number]) for r in study.results))
        for number, path in enumerate(study.layers)
    ]
    return text_table(("layer", *headings), rows, title="Hit rate by layer")


def render_cache_json(study: CacheStudy) -> str:
    """Return indented JSON text; docs/routes_study.md lists the keys."""
    entries = attributes(study, "layers", "together", "shared", "steps", "steps_recorded", "tokens")
    entries |= attributes(study, "expert_bytes", "curves")
    return json_text({**entries, "results": [_result(result) for result in study.results]})


def _result(result: CacheResult) -> dict[str, Any]:
    entries = attributes(result, "policy", "experts_in_memory", "requests", "hits", "prefetch")
    entries |= attributes(result, "hit_rate", "layer_hit_rates", "loads_per_token", "bytes_per_token")
    if result.prefetch is not None:
        rates = attributes(result.prefetch, "hit_rate", "hit_rate_without", "precision")
        entries["prefetch"] = {**rates, **vars(result.prefetch)}
    return entries
