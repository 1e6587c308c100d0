"""Notebook representations of a comparison, a live summary and a single call: tables without scripts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from moe_trace.data.display.columns import Cell, Column, columns_of
from moe_trace.data.display.load_picture import TOP, load_picture, png
from moe_trace.data.display.tables import fixed, share
from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import RoutingSample
from moe_trace.data.summary import RouterSummary, Summary, model_name
from moe_trace.read.diff import Comparison
from moe_trace.show.diff import SIDES, headline

_BAR_PX = 160


def html_table(headings: Sequence[str | Column], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a plain table with numbers as on a terminal and texts in full; every cell is escaped."""
    columns = columns_of(headings)
    titles = (f' title="{escape(c.definition)}"' * bool(c.definition) for c in columns)
    head = "".join(f"<th{title}>{escape(c.label)}</th>" for c, title in zip(columns, titles, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: Column, value: Cell) -> str:
    return f"<td>{escape(value if isinstance(value, str) else column.terminal_cell(value))}</td>"


def comparison_html(comparison: Comparison) -> str:
    """Return the headline, set-up differences, the layers' distances as bars, and changed metrics."""
    parts = [f"<p><b>{escape(headline(comparison))}</b></p>"]
    parts.append(f"<p>A {escape(comparison.a)}<br>B {escape(comparison.b)}</p>")
    if comparison.setup:
        parts.append(html_table(("set-up", "A", "B"), ((c.fact, c.a, c.b) for c in comparison.setup)))
    if comparison.routing:
        parts.append(_distances(comparison))
    shown = [c for c in comparison.changes if c.site == "all" or c.verdict == "changed"]
    if shown:
        rows = ((c.stage, c.site, c.metric, c.a, c.b, c.relative, c.verdict) for c in shown)
        parts.append(html_table(("stage", "layer", "metric", *SIDES, "change", "verdict"), rows))
    parts += [f"<p>{escape(note)}</p>" for note in comparison.notes]
    return f"<div>{''.join(parts)}</div>"


def _distances(comparison: Comparison) -> str:
    rows = []
    for r in comparison.routing:
        colour = "#c0392b" if r.changed else "#95a5a6"
        width = round(_BAR_PX * r.total_variation)
        bar = f'<div style="background:{colour};height:0.8em;width:{width}px"></div>'
        words = f"{share(r.total_variation)} (chance: under {share(r.chance)})"
        rows.append(
            f"<tr><td>{escape(r.stage)}</td><td>{escape(r.site)}</td><td>{bar}</td><td>{words}</td></tr>"
        )
    head = "<th>stage</th><th>layer</th><th colspan=2>assignments that went to other experts</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def summary_html(summary: Summary) -> str:
    """Return a table with a row per router."""
    headings = ("layer", "calls", "tokens", "max÷mean", "CV", "dead", "router entropy", "router confidence")
    rows = (
        (
            *(r.info.site, r.calls, r.tokens, r.load.max_over_mean, r.load.cv, len(r.load.dead_experts)),
            *(r.decisions.entropy_mean, r.decisions.confidence_mean),
        )
        for r in summary.routers
    )
    name = model_name(summary.model, 120)
    picture = load_picture_html(summary.routers)
    return f"<div><h3>{escape(name)}</h3>{picture}{html_table(headings, rows)}</div>"


def load_picture_html(routers: Sequence[RouterSummary]) -> str:
    """Return a picture of the load of every expert, a row per layer; empty without assignments."""
    loads = [router.assignments for router in routers if sum(router.assignments)]
    if not loads:
        return ""
    words = (
        "Load of each expert: a row for each layer, a column for each expert; white is an equal share, blue "
        f"less, orange more, up to {TOP:.0f} times and beyond."
    )
    source = f"data:image/png;base64,{b64encode(png(load_picture(loads))).decode()}"
    return f'<p>{words}<br><img alt="{words}" src="{source}"></p>'


def sample_html(sample: RoutingSample) -> str:
    """Return a table with the metrics of one call."""
    load = describe_load(sample.assignments)
    rows = [
        ("router", f"{sample.site} ({sample.name})"),
        ("call, step", f"{sample.call}, {sample.step}"),
        ("stage, pass", f"{sample.stage}, {sample.phase}"),
        ("tokens x top-k", f"{sample.tokens:,} x {sample.top_k}"),
        ("active experts", f"{load.active_experts} of {len(sample.assignments)}"),
        ("load max÷mean", fixed(load.max_over_mean, 3)),
        ("router entropy (nats)", fixed(sample.router_entropy, 3)),
        ("router confidence", fixed(sample.confidence, 3)),
    ]
    return html_table(("", ""), rows)
