"""Routes as a self-contained page: the text in the colours of its experts, and the figures of the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moe_trace.data.display.tables import printable
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.summary import model_name
from moe_trace.read.routes.text.tokenizer import Vocabulary
from moe_trace.show.document import document, figure_html, figure_spec
from moe_trace.show.figures.figure import Figure
from moe_trace.show.routes.tokens import TokenPages

TOKENS_MAX_BYTES = 32 * 2**20
"""Maximum size of all encoded tokens in a page, which a browser reads entirely before it shows anything."""


def token_view(key: str, routes: RecordedRoutes, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return the input of tokens.js: as many pages as fit, and the id (`key`) of the element to fill."""
    pages = TokenPages(routes, vocabulary)
    found: list[dict[str, Any]] = []
    size_bytes = 0
    for index in range(len(pages)):
        page = pages.page(index)
        size_bytes += len(page["data"])
        if found and size_bytes > TOKENS_MAX_BYTES:
            break
        found.append(page)
    header = pages.header()
    header["pages"] = header["pages"][: len(found)]
    return {"id": key, "header": header, "pages": found}


@dataclass(frozen=True)
class RoutesPart:
    """Routes as a part of a page."""

    html: str
    specs: list[dict[str, object]]
    """Specifications of its figures."""
    views: list[dict[str, Any]]
    """Its tokens, one entry per group of layers."""


def routes_part(
    prefix: str,
    routes: RecordedRoutes,
    vocabulary: Vocabulary | None = None,
    figures: Sequence[Sequence[Figure]] = (),
) -> RoutesPart:
    """Render all groups of layers of a file.

    Args:
        prefix: prefix of the ids of elements.
        vocabulary: mapping from token ids to text, used where ids were recorded.
        figures: figures of each group of layers.
    """
    views = [token_view(f"{prefix}tokens{i}", group, vocabulary) for i, group in enumerate(routes.groups)]
    drawn = [*figures, *[()] * len(views)][: len(views)]
    groups = zip(views, drawn, strict=True)
    html = f"""{_facts(routes)}
{"".join(f"<p class='soft'>{escape(note)}</p>" for note in notes(routes, vocabulary))}
{"".join(_group(f"{prefix}routes{i}", i, view, found) for i, (view, found) in enumerate(groups))}"""
    specs = [figure_spec(f"{prefix}routes{i}", figure) for i, found in enumerate(drawn) for figure in found]
    return RoutesPart(html, specs, views)


def render_routes_page(
    routes: RecordedRoutes,
    *,
    label: str,
    vocabulary: Vocabulary | None = None,
    figures: Sequence[Sequence[Figure]] = (),
) -> str:
    """Render the whole page of a file of routes.

    Args:
        routes: the routes in the file.
        label: name of the file.
        vocabulary: as in `routes_part`.
        figures: as in `routes_part`.

    Raises:
        UsageError: plotly is not installed.
    """
    label = printable(label, 200)
    title = printable(model_name(routes.model), 120)
    part = routes_part("", routes, vocabulary, figures)
    body = f"""<section aria-label="{escape(label)}">
<p class="path">{escape(label)}</p>
{part.html}
</section>"""
    return document(f"{title}: routes", body, part.specs, routes=part.views)


def notes(routes: RecordedRoutes, vocabulary: Vocabulary | None, how: str = "--tokenizer PATH") -> list[str]:
    """Return notes on missing data and the reasons; `how` explains how to set a tokenizer."""
    found = []
    if routes.token_ids is None:
        found.append(
            "The text was not recorded, so tokens stand as their positions; "
            "Routes(token_ids=True) records the ids of the prompt's tokens."
        )
    elif vocabulary is None:
        found.append(f"Tokens stand as their ids; {how} says their text.")
    dropped = {reason: tokens for reason, tokens in routes.dropped.items() if tokens}
    if dropped:
        reasons = ", ".join(f"{tokens:,} ({reason})" for reason, tokens in dropped.items())
        found.append(f"Tokens that the recorder dropped are not here: {reasons}.")
    return found


def _facts(routes: RecordedRoutes) -> str:
    facts = [
        ("tokens", f"{len(routes):,}"),
        ("of them padding", f"{int(routes.padding.sum()):,}"),
        ("layers", f"{sum(len(group.layers) for group in routes.groups):,}"),
        ("experts", _span([e for group in routes.groups for e in group.num_experts])),
        ("experts a token", _span([k for group in routes.groups for k in group.top_k])),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="totals">{items}</dl>'


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _group(prefix: str, number: int, view: dict[str, Any], figures: Sequence[Figure]) -> str:
    left_out = view["header"]["tokens"] - sum(page["tokens"] for page in view["pages"])
    note = (
        f"<p class='soft'>The last {left_out:,} tokens are left out: they would make this page too "
        "large. TensorBoard's MoE tab shows all of them.</p>"
        if left_out
        else ""
    )
    heading = "Tokens" if number == 0 else f"Tokens of other layers ({number + 1})"
    figures_html = "".join(figure_html(prefix, figure) for figure in figures)
    return f'<h2>{heading}</h2>{note}<div id="{view["id"]}"></div>{figures_html}'
