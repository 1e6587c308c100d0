"""A self-contained HTML page that works offline: its head, its scripts, and figures as HTML."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from moe_trace.data.display.columns import columns_of
from moe_trace.data.display.json import attributes, plain
from moe_trace.data.errors import UsageError
from moe_trace.show.figures.figure import TABLE_ROWS_MAX, Figure

_PAGE = Path(__file__).parent / "page"
_STATIC = Path(__file__).parent / "tensorboard" / "static"
_SHARED_SCRIPTS = ("theme.js", "dom.js", "tokens.js")
"""JavaScript modules shared with the TensorBoard tab; a page concatenates them without their imports."""
_IMPORT = re.compile(r"^import .*;\n", re.MULTILINE)

# Nothing is loaded from other hosts; plotly writes style elements and uses data: and blob: images.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, body: str, specs: Sequence[object], *, routes: Sequence[object] = ()) -> str:
    """Return the whole page, with plotly's own bundle included.

    Args:
        title: plain text.
        body: HTML.
        specs: specifications of the figures in `body`, from `figure_spec`.
        routes: pages of tokens, each for the element with its `id`.

    Raises:
        UsageError: plotly is not installed.
    """
    scripts = [_IMPORT.sub("", (_STATIC / name).read_text(encoding="utf-8")) for name in _SHARED_SCRIPTS]
    return f"""{_head(title)}<body>
<a class="skip" href="#main">Skip to the findings</a>
<header>
<h1>{escape(title)}</h1>
<button id="theme" type="button">Dark theme</button>
</header>
<main id="main">
{body}
</main>
<script>{_plotly()}</script>
<script type="application/json" id="figures">{_script_json(specs)}</script>
<script type="application/json" id="routes">{_script_json(routes)}</script>
<script type="module">
{"".join(scripts)}
{(_PAGE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _head(title: str) -> str:
    styles = (_PAGE / "report.css", _STATIC / "tokens.css")
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)} - moe_trace</title>
<link rel="icon" href="data:,">
<style>
{"".join(style.read_text(encoding="utf-8") for style in styles)}</style>
</head>
"""


def figure_spec(prefix: str, figure: Figure) -> dict[str, object]:
    """Return the specification that the page's script passes to plotly."""
    return {"id": f"{prefix}-{figure.key}", **attributes(figure, "data", "layout", "frames")}


def figure_html(prefix: str, figure: Figure) -> str:
    """Return the title and caption of a figure, the element for its plot, and its table."""
    key = f"{prefix}-{figure.key}"
    return f"""<figure aria-labelledby="{key}-title">
<h3 id="{key}-title">{escape(figure.title)}</h3>
<figcaption id="{key}-caption">{escape(figure.caption)}</figcaption>
{_slider(key, figure)}
<div class="plot" id="{key}" role="img" aria-labelledby="{key}-title" aria-describedby="{key}-caption"></div>
<details><summary>The same as a table</summary><div class="scroll" tabindex="0" role="region"
 aria-label="{escape(figure.title)}, table">{table_html(figure)}</div></details>
</figure>
"""


def _slider(key: str, figure: Figure) -> str:
    if not figure.frames:
        return ""
    first = escape(figure.frames[0].label)
    return (
        f'<div class="slider"><label for="{key}-step">{figure.slider}</label>'
        f'<input type="range" id="{key}-step" min="0" max="{len(figure.frames) - 1}" value="0" step="1" '
        f'aria-valuetext="{first}"><output id="{key}-label" for="{key}-step">{first}</output></div>'
    )


def table_html(figure: Figure) -> str:
    """Return the table of a figure as HTML."""
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
    omitted = len(figure.rows) - TABLE_ROWS_MAX
    note = f'<p class="soft">… and {omitted} more layers.</p>' if omitted > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _script_json(value: object) -> str:
    """Return JSON that cannot end the script element that contains it."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    """Read the JavaScript bundle of the installed plotly package without importing the package."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UsageError(
            "the HTML report needs plotly, which is not installed; run: pip install 'moe_trace[report]'"
        )
    bundle = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return bundle.read_text(encoding="utf-8").replace("</script", "<\\/script")
