"""Estimate the effect of another placement of the experts over ranks, from recorded counts alone.

Load per rank and all-to-all volume are computed for contiguous placement (the usual default), balanced
placement, and placement with replicas of hot experts, each evaluated on steps that it was not chosen on.
PATH is a trace, a folder of traces, or counts per expert (export --to eplb, JSON with counts per text, or a
dump of SGLang's expert distribution recorder, .pt).

Example: moe-trace placement runs/demo --ranks 2,4,8 --out map.json
"""

from __future__ import annotations

import argparse
import sys

from moe_trace.cli.arguments import (
    add_choice,
    add_format,
    add_output,
    chosen_filter,
    parse_names,
    parse_numbers,
    parse_steps,
    refuse_to_replace,
)
from moe_trace.cli.pipes import TRACE
from moe_trace.data.errors import UsageError
from moe_trace.placement.counts import ExpertCounts
from moe_trace.placement.map_file import write_map
from moe_trace.placement.plan import Cluster
from moe_trace.placement.planner import PlanOptions
from moe_trace.placement.sources import read_counts
from moe_trace.placement.split import WAYS, Split, split_by, split_named
from moe_trace.placement.study import study_placement
from moe_trace.show.placement import render_placement_json, render_placement_text

MAX_RANKS = 65536


READS = {"path": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="trace, folder of traces, or file of counts")
    add(
        "--ranks",
        default="8",
        metavar="8,16,64",
        help="numbers of ranks, divisors of the experts (default: 8)",
    )
    add("--nodes", type=int, default=1, metavar="N", help="nodes that the ranks are spread over (default: 1)")
    add("--replicas", type=int, default=1, metavar="R", help="slots per rank for extra copies (default: 1)")
    add("--groups", type=int, metavar="G", help="expert groups, each kept on one node (group routing)")
    add(
        "--hedge",
        action="store_true",
        help="also balance plans with copies for inputs unlike the recorded ones",
    )
    add(
        "--split",
        choices=WAYS,
        default="auto",
        help="what to hold out (default: auto, every second step or each text in turn)",
    )
    add("--choose-on", metavar="NAMES", help="choose plans on these texts (c4,book) or steps (0-9)")
    add(
        "--judge-on", metavar="NAMES", help="evaluate plans on these texts or steps (default: all the others)"
    )
    add(
        "--slot-bytes",
        type=int,
        metavar="N",
        help="size of one token's hidden state in bytes, if not recorded",
    )
    add_format(parser)
    add("--all", action="store_true", help="show every layer")
    add_output(parser, "MAP.json", "write the plans to this file: which slot holds which expert")
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        refuse_to_replace(arguments.out, force=arguments.force, inputs=[arguments.path])
    options = [
        PlanOptions(
            cluster=Cluster(number, arguments.nodes),
            replicas=arguments.replicas,
            groups=arguments.groups,
            hedge=arguments.hedge,
        )
        for number in parse_numbers("--ranks", arguments.ranks, MAX_RANKS)
    ]
    counts = _counts(arguments)
    study = study_placement(counts, _split(counts, arguments), options)
    if arguments.format == "json":
        print(render_placement_json(study), end="")
    else:
        print(render_placement_text(study, every_layer=arguments.all), end="")
    if arguments.out is not None:
        write_map(study, arguments.out)
        print(f"wrote {arguments.out}", file=sys.stderr)
    return 0


def _counts(arguments: argparse.Namespace) -> ExpertCounts:
    array = None
    if arguments.path.endswith(".pt"):
        from moe_trace.integrations.sglang.dumps import counts_of_dump

        array = counts_of_dump(arguments.path)
    return read_counts(
        arguments.path, array=array, chosen=chosen_filter(arguments), slot_bytes=arguments.slot_bytes
    )


def _split(counts: ExpertCounts, arguments: argparse.Namespace) -> Split:
    if arguments.choose_on is None and arguments.judge_on is None:
        return split_by(counts, arguments.split)
    if arguments.split != "auto":
        raise UsageError("found --split with --choose-on or --judge-on, expected one way to split; drop one")
    choose, judge = (_labels(counts, text) for text in (arguments.choose_on, arguments.judge_on))
    if choose is None:
        choose = [label for label in counts.labels if label not in (judge or ())]
    if judge is None:
        judge = [label for label in counts.labels if label not in choose]
    return split_named(counts, choose, judge)


def _labels(counts: ExpertCounts, text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = parse_names(text)
    if counts.kind == "step" and not all(name in counts.labels for name in names):
        return [str(step) for step in sorted(parse_steps(text))]
    return names
