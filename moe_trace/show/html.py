"""A summary as a self-contained HTML page that works offline, and as a fragment for notebooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import starmap

from moe_trace.data.display.columns import number_text
from moe_trace.data.display.tables import scaled, share
from moe_trace.data.summary import model_name
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.findings.finding import Finding
from moe_trace.show.document import document, figure_html, figure_spec, table_html
from moe_trace.show.figures.figure import Figure
from moe_trace.show.figures.ranks import rank_figures
from moe_trace.show.figures.report import figures
from moe_trace.show.notebook import load_picture_html
from moe_trace.show.routes_page import RoutesPart
from moe_trace.show.text.phases import shares_sentence
from moe_trace.show.text.ranks import rank_sentences

_NOTEBOOK_FIGURES = ("experts", "latency", "forward")


def render_page(summaries: Sequence[TraceSummary], routes: Sequence[RoutesPart | None] | None = None) -> str:
    """Return the whole page, with plotly's own bundle included.

    Args:
        routes: for each summary, the routes recorded with it, or None.

    Raises:
        UsageError: plotly is not installed.
    """
    all_routes = routes or [None] * len(summaries)
    rendered = [_section(f"f{i}", *pair) for i, pair in enumerate(zip(summaries, all_routes, strict=True))]
    sections = "\n".join(html for html, _ in rendered)
    specs = [spec for _, found in rendered for spec in found]
    views = [view for part in all_routes if part is not None for view in part.views]
    title = model_name(summaries[0].model, 120) if len(summaries) == 1 else f"{len(summaries)} traces"
    return document(title, sections, specs, routes=views)


def _by_stage(summary: TraceSummary) -> dict[str, TraceSummary]:
    """Map stages to their summaries; a summary without stages has the key ""."""
    return {str(stage): part for stage, part in summary.stages.items()} or {"": summary}


def render_fragment(summary: TraceSummary) -> str:
    """Return totals, findings, the load as a picture and the tables, without scripts, for a notebook."""
    blocks, findings = [], summary.findings_apart()
    for stage, part in _by_stage(summary).items():
        found = [figure for figure in figures(part) if figure.key.split("-")[0] in _NOTEBOOK_FIGURES]
        tables = "\n".join(f"<p><b>{escape(f.title)}</b></p>{table_html(f)}" for f in found)
        heading = f"<h4>{stage.capitalize()}</h4>" if stage else ""
        picture = load_picture_html(part.routers)
        blocks.append(f"{heading}{_totals(part)}{_findings(findings[stage])}{picture}{tables}")
    blocks.append(_findings_of_run(summary))
    return f"<div><h3>{escape(model_name(summary.model, 120))}</h3>{''.join(blocks)}</div>"


def _section(
    prefix: str, summary: TraceSummary, routes: RoutesPart | None
) -> tuple[str, list[dict[str, object]]]:
    """Return one trace and its figures' specifications: its stages, or all of it, then its ranks together."""
    findings = summary.findings_apart()
    parts = [
        (f"{prefix}-{stage}" if stage else prefix, stage, _answers(part, findings[stage]), figures(part))
        for stage, part in _by_stage(summary).items()
    ]
    if summary.ranks is not None:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in rank_sentences(summary.ranks))
        parts.append((prefix, "ranks", f"<ul>{items}</ul>", rank_figures(summary.ranks)))
    specs = [figure_spec(key, figure) for key, _, _, found in parts for figure in found]
    specs += routes.specs if routes is not None else []
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
    html = f"""<section aria-label="{escape(str(summary.trace))}">
<p class="path">{escape(str(summary.trace))}</p>
{"".join(starmap(_part, parts))}
{_findings_of_run(summary)}
{f'<h2 class="part">Routes</h2>{routes.html}' if routes is not None else ""}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
</section>"""
    return html, specs


def _part(prefix: str, name: str, words: str, drawn: Sequence[Figure]) -> str:
    heading = f'<h2 class="part">{name.capitalize()}</h2>' if name else ""
    return f"{heading}{words}\n{''.join(figure_html(prefix, figure) for figure in drawn)}"


def _answers(summary: TraceSummary, found: Sequence[Finding]) -> str:
    phases = f"<p>{escape(shares_sentence(summary.phases))}</p>" if summary.phases is not None else ""
    return f"""{_totals(summary)}
<h3>Findings</h3>
{_findings(found)}
{phases}"""


def _totals(summary: TraceSummary) -> str:
    totals, speed, phases = summary.totals, summary.speed, summary.phases
    facts = [
        ("routers", f"{totals.routers:,}"),
        ("calls", f"{totals.calls:,}"),
        ("routed tokens", f"{totals.tokens:,}"),
        ("mean load max÷mean", _number(totals.load_max_over_mean_mean)),
        ("expert FLOP", scaled(totals.flops_experts)),
    ]
    if totals.requests_per_forward is not None:
        facts.append(("requests a forward", _number(totals.requests_per_forward)))
    if phases is not None and phases.whole.moe_share_of_model is not None:
        facts.append(("MoE of the model's work", share(phases.whole.moe_share_of_model)))
    if speed is not None and speed.experts.flops_per_s is not None:
        facts.append(("experts", scaled(speed.experts.flops_per_s, "FLOP/s")))
    if speed is not None and speed.experts.share_of_peak is not None:
        facts.append(("of the device's peak", share(speed.experts.share_of_peak)))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="totals">{items}</dl>'


def _findings_of_run(summary: TraceSummary) -> str:
    found = summary.findings_apart()[""] if summary.stages else ()
    return f"<h3>Findings about the run as a whole</h3>{_findings(found)}" if found else ""


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return '<p class="soft">No rule found anything to look at.</p>'
    items = "\n".join(
        f'<li><b class="severity {f.severity}">{escape(f.price)}</b> {_with_code(f.sentence)} '
        f'<span class="advice">{_with_code(f.advice)}</span></li>'
        for f in found
    )
    return f'<ul class="findings">{items}</ul>'


def _with_code(text: str) -> str:
    """Escape a text and mark what is between backquotes as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _number(value: float | None) -> str:
    return "-" if value is None else number_text(value)
