"""Study which token went to which experts.

Reports co-activation of experts, reuse from token to token, how well a layer predicts the next, and the
number of distinct experts by step size; also gating weights and vocabulary if they were recorded. Several
files of one model are treated as domains, named by --labels; several files of the same tokens are treated as
checkpoints, and their saturation is reported. The formulas are in docs/routes_study.md.

Example: moe-trace routes study code.routes.npz prose.routes.npz --labels code,prose
"""

from __future__ import annotations

import argparse
from pathlib import PurePath

from moe_trace.cli.arguments import add_format
from moe_trace.data.errors import UsageError

READS = {"files": ".routes.npz"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="routes files")
    add("--labels", metavar="A,B", help="one name per file (default: the file's own)")
    add(
        "--pairs",
        choices=("all", "adjacent"),
        default="all",
        help="pairs counted as co-activated: all pairs of a token's experts, or only neighbours in the top-k "
        "order, as in the OLMoE authors' script (default: all)",
    )
    add(
        "--predicted",
        nargs="+",
        metavar="FILE.npy",
        help="token ids that the model predicted at the rows of each file, negative where unknown; expert "
        "specialisation is reported for these, too",
    )
    add_format(parser, alias=True)
    add("--matrices", action="store_true", help="include the counts of every pair of experts in the JSON")


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.cli.routes.reading import named, predicted_ids, routes_of
    from moe_trace.read.routes.study import study
    from moe_trace.show.routes.study import render_study_json, render_study_text

    names = [PurePath(named(path, arguments)).name for path in arguments.files]
    labels = [part.strip() for part in arguments.labels.split(",")] if arguments.labels else names
    if len(labels) != len(names):
        raise UsageError(
            f"found --labels {arguments.labels}, expected {len(names)} names, with commas between them"
        )
    parts = [routes_of(path, arguments) for path in arguments.files]
    predicted = None if arguments.predicted is None else [predicted_ids(path) for path in arguments.predicted]
    found = study(parts, labels, pairs=arguments.pairs, predicted=predicted)
    if arguments.format == "json":
        print(render_study_json(found, matrices=arguments.matrices), end="")
    else:
        print(render_study_text(found), end="")
    return 0
