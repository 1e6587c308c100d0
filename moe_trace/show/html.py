"""A summary as one self-contained page that works offline, and as a fragment for notebooks."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from moe_trace.data.display.columns import columns_of, number_text
from moe_trace.data.display.json import without_nonfinite
from moe_trace.data.display.tables import scaled, share
from moe_trace.data.errors import UsageError
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.findings.finding import Finding
from moe_trace.show.figures.figure import TABLE_ROWS_MAX, Figure
from moe_trace.show.figures.ranks import rank_figures
from moe_trace.show.figures.report import figures
from moe_trace.show.notebook import load_picture_html
from moe_trace.show.text.phases import shares_sentence
from moe_trace.show.text.ranks import rank_sentences

_IN_NOTEBOOKS = ("experts", "latency", "forward")
_PAGE = Path(__file__).parent / "page"
_THEME = Path(__file__).parent / "tensorboard" / "static" / "theme.js"


def render_page(summaries: Sequence[TraceSummary]) -> str:
    """The whole page; plotly's own bundle is inside.

    Raises:
        UsageError: plotly is not installed.
    """
    drawn = [_parts(f"f{i}", summary) for i, summary in enumerate(summaries)]
    sections = "\n".join(map(_section, summaries, drawn))
    specs = [_spec(part.prefix, figure) for parts in drawn for part in parts for figure in part.figures]
    title = escape(_title(summaries[0])) if len(summaries) == 1 else f"{len(summaries)} traces"
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title} - moe_trace</title>
<link rel="icon" href="data:,">
<style>
{(_PAGE / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the findings</a>
<header>
<h1>{title}</h1>
<button id="theme" type="button">Dark theme</button>
</header>
<main id="main">
{sections}
</main>
<script>{_plotly()}</script>
<script type="application/json" id="figures">{_script_json(specs)}</script>
<script type="module">
{_THEME.read_text(encoding="utf-8")}
{(_PAGE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _spec(prefix: str, figure: Figure) -> dict[str, object]:
    """What the page's script hands to plotly."""
    frames = [asdict(frame) for frame in figure.frames]
    return {
        "id": f"{prefix}-{figure.key}",
        "data": figure.data,
        "layout": figure.layout,
        "frames": frames,
    }


@dataclass(frozen=True)
class _Part:
    """One stage of a trace, all of a trace of a single stage, or its ranks together."""

    prefix: str
    """Of the ids of its figures."""
    heading: str
    """Empty where there is no other."""
    words: str
    """What stands above the figures, as HTML."""
    figures: list[Figure]


def _by_stage(summary: TraceSummary) -> dict[str, TraceSummary]:
    """Each stage under its name; a single one under none."""
    return {str(stage): part for stage, part in summary.stages.items()} or {"": summary}


def _parts(prefix: str, summary: TraceSummary) -> list[_Part]:
    apart = summary.findings_apart()
    parts = [
        _Part(
            "-".join(filter(None, (prefix, stage))),
            stage.capitalize(),
            _answers(part, apart[stage]),
            figures(part),
        )
        for stage, part in _by_stage(summary).items()
    ]
    if summary.ranks is not None:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in rank_sentences(summary.ranks))
        parts.append(_Part(prefix, "Ranks", f"<ul>{items}</ul>", rank_figures(summary.ranks)))
    return parts


# Nothing may come from outside; plotly writes style elements and draws on data: and blob: images.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def render_fragment(summary: TraceSummary) -> str:
    """Totals, findings, the load as a picture and the tables, without scripts: what a notebook shows."""
    shown, apart = [], summary.findings_apart()
    for stage, part in _by_stage(summary).items():
        found = [figure for figure in figures(part) if figure.key.split("-")[0] in _IN_NOTEBOOKS]
        tables = "\n".join(f"<p><b>{escape(f.title)}</b></p>{_table(f)}" for f in found)
        heading = f"<h4>{stage.capitalize()}</h4>" if stage else ""
        picture = load_picture_html(part.routers)
        shown.append(f"{heading}{_totals(part)}{_findings(apart[stage])}{picture}{tables}")
    shown.append(_findings_of_run(summary))
    return f"<div><h3>{escape(_title(summary))}</h3>{''.join(shown)}</div>"


def _title(summary: TraceSummary) -> str:
    return str(summary.model.get("name") or summary.model.get("class") or "unnamed model")[:120]


def _section(summary: TraceSummary, parts: Sequence[_Part]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
    return f"""<section aria-label="{escape(str(summary.trace))}">
<p class="path">{escape(str(summary.trace))}</p>
{"".join(map(_part, parts))}
{_findings_of_run(summary)}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
</section>"""


def _part(part: _Part) -> str:
    heading = f'<h2 class="part">{part.heading}</h2>' if part.heading else ""
    return f"{heading}{part.words}\n{''.join(_figure(part.prefix, figure) for figure in part.figures)}"


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
    if phases is not None and phases.whole.moe_share_of_model is not None:
        facts.append(("MoE of the model's work", share(phases.whole.moe_share_of_model)))
    if speed is not None and speed.experts.flops_per_s is not None:
        facts.append(("experts", scaled(speed.experts.flops_per_s, "FLOP/s")))
    if speed is not None and speed.experts.share_of_peak is not None:
        facts.append(("of the device's peak", share(speed.experts.share_of_peak)))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="totals">{items}</dl>'


def _findings_of_run(summary: TraceSummary) -> str:
    """Those about the run as a whole, below its stages."""
    found = summary.findings_apart()[""] if summary.stages else ()
    return f"<h3>Findings about the run as a whole</h3>{_findings(found)}" if found else ""


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return '<p class="soft">No rule found anything to look at.</p>'
    items = "\n".join(
        f'<li><b class="severity {f.severity}">{escape(f.price)}</b> {_marked(f.sentence)} '
        f'<span class="advice">{_marked(f.advice)}</span></li>'
        for f in found
    )
    return f'<ul class="findings">{items}</ul>'


def _marked(text: str) -> str:
    """Escaped, with what stands between backquotes as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _figure(prefix: str, figure: Figure) -> str:
    key = f"{prefix}-{figure.key}"
    return f"""<figure aria-labelledby="{key}-title">
<h3 id="{key}-title">{escape(figure.title)}</h3>
<figcaption id="{key}-caption">{escape(figure.caption)}</figcaption>
{_slider(key, figure)}
<div class="plot" id="{key}" role="img" aria-labelledby="{key}-title" aria-describedby="{key}-caption"></div>
<details><summary>The same as a table</summary><div class="scroll" tabindex="0" role="region"
 aria-label="{escape(figure.title)}, table">{_table(figure)}</div></details>
</figure>
"""


def _slider(key: str, figure: Figure) -> str:
    if not figure.frames:
        return ""
    first = escape(figure.frames[0].label)
    return (
        f'<div class="slider"><label for="{key}-step">Step</label>'
        f'<input type="range" id="{key}-step" min="0" max="{len(figure.frames) - 1}" value="0" step="1" '
        f'aria-valuetext="{first}"><output id="{key}-label" for="{key}-step">{first}</output></div>'
    )


def _table(figure: Figure) -> str:
    columns = columns_of(figure.headings)
    head = "".join(f'<th scope="col" title="{escape(c.definition)}">{escape(c.label)}</th>' for c in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(c.cell(cell))}</th>' if i == 0 else f"<td>{escape(c.cell(cell))}</td>"
            for i, (c, cell) in enumerate(zip(columns, row, strict=True))
        )
        + "</tr>"
        for row in figure.rows[:TABLE_ROWS_MAX]
    )
    more = len(figure.rows) - TABLE_ROWS_MAX
    rest = f'<p class="soft">… and {more} more layers.</p>' if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"


def _number(value: float | None) -> str:
    return "-" if value is None else number_text(value)


def _script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(without_nonfinite(value), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    """The bundle out of the installed package, without importing the package."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UsageError(
            "the HTML report needs plotly, which is not installed; run: pip install 'moe_trace[report]'"
        )
    bundle = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return bundle.read_text(encoding="utf-8").replace("</script", "<\\/script")
