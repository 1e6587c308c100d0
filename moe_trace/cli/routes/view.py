"""Write routes as a web page, with the text coloured by expert and the figures of the study.

The page is self-contained: it needs no internet access and sends nothing. Text is shown only if token ids
were recorded (`Routes(token_ids=True)`) and a tokenizer is given. With several files, the first is shown
token by token, and all are studied together: as checkpoints if they have the same tokens, else as domains.

Example: moe-trace routes view runs/demo/trace.routes.npz --tokenizer demo -o routes.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.cli.arguments import add_output, refuse_to_replace
from moe_trace.cli.pipes import STANDARD_INPUT
from moe_trace.data.files import write_text

ENDING = ".routes.npz"


READS = {"files": ENDING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="routes files")
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer for the recorded token ids: a tokenizer.json, a folder with one, a JSON vocabulary "
        "{token: id}, or demo for the demo model's",
    )
    add_output(parser, "PAGE", "output page (default: the first FILE's name, with extension .html)")


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.cli.routes.reading import named, routes_of
    from moe_trace.read.routes.text.tokenizer import read_vocabulary
    from moe_trace.show.figures.routes.report import routes_figures
    from moe_trace.show.routes_page import render_routes_page

    names = [named(file, arguments) for file in arguments.files]
    target = arguments.out or _page_of(names[0])
    refuse_to_replace(target, force=arguments.force, inputs=arguments.files)
    vocabulary = read_vocabulary(arguments.tokenizer) if arguments.tokenizer else None
    parts = [routes_of(file, arguments) for file in arguments.files]
    labels = [Path(name).name.removesuffix(ENDING) for name in names]
    groups = zip(*(part.groups for part in parts), strict=False)
    figures = [routes_figures(group, labels) for group in groups]
    write_text(target, render_routes_page(parts[0], label=names[0], vocabulary=vocabulary, figures=figures))
    print(f"wrote {target}", file=sys.stderr)
    return 0


def _page_of(name: str) -> Path:
    if name == STANDARD_INPUT:
        return Path("routes.html")
    file = Path(name)
    return file.with_name(file.name.removesuffix(ENDING) + ".html")
