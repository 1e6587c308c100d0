"""Compare routings of the same tokens: precisions, engines, training and inference, checkpoints.

Reports how much of the top-k sets and of their order is shared, by layer and position, how many tokens
differ anywhere, and in which layer the difference begins. Tokens are matched by sequence and position, and
must have the same ids if ids were recorded. With three or more files, each is compared with the last one
(router saturation).

Example: moe-trace routes diff bf16.routes.npz fp8.routes.npz
"""

from __future__ import annotations

import argparse

from moe_trace.cli.arguments import add_format
from moe_trace.cli.routes.reading import ROUTES, named, routes_of
from moe_trace.data.errors import UsageError

READS = {"files": ROUTES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="two routes files, A and B, or checkpoints in order of training",
    )
    add_format(parser, alias=True)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.data.display.json import json_text
    from moe_trace.read.routes.compare.comparison import compare_routes
    from moe_trace.show.routes import diff

    *files, last = arguments.files
    if not files:
        raise UsageError("found one file, expected two or more: moe-trace routes diff A B")
    names = [named(path, arguments) for path in arguments.files]
    final = routes_of(last, arguments)
    found = [compare_routes(routes_of(path, arguments), final) for path in files]
    as_json = arguments.format == "json"
    if len(files) == 1:
        plain, text = diff.plain_routes_diff, diff.render_routes_diff
        print(json_text(plain(names, found[0])) if as_json else text(names, found[0]), end="")
    elif as_json:
        print(json_text(diff.plain_saturation(names, found)), end="")
    else:
        print(diff.render_saturation(names, found), end="")
    return 0
