"""Simulate keeping some of the experts in fast memory, on recorded routes.

Reports hit rate, experts loaded and bytes moved per token, by policy and by the number of experts per layer
that fit. The policies are least recently used (lru), least frequently used (lfu), the best fixed choice
(static), and Belady's optimum (belady), which no policy beats. A step is one forward, whose tokens need
their experts at the same time.

Example: moe-trace routes cache runs/demo/trace.routes.npz --experts-in-memory 4,8
"""

from __future__ import annotations

import argparse
from typing import Any

from moe_trace.cli.arguments import add_format, parse_names, parse_numbers
from moe_trace.data.errors import UsageError

STEPS_MAX = 100_000


READS = {"file": ".routes.npz"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="routes file")
    add("--experts-in-memory", required=True, metavar="8,16,32", help="numbers of experts per layer that fit")
    add(
        "--policy",
        default="lru,lfu,static,belady",
        metavar="lru,belady",
        help="policies to simulate (default: all four)",
    )
    add("--shared", action="store_true", help="share one memory of the same total size among all layers")
    add("--each-token", action="store_true", help="treat each token as a step, as if decoded alone")
    add(
        "--prefetch",
        choices=("transition",),
        help="prefetch the experts that a layer's experts predict for the next layer",
    )
    add(
        "--expert-bytes",
        type=int,
        metavar="N",
        help="size of one expert's weights in bytes (default: from its shape)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        default=STEPS_MAX,
        help=f"simulate the first N steps, 0 for all (default: {STEPS_MAX:,})",
    )
    add("--layers", action="store_true", help="show hit rates of every layer")
    add_format(parser, alias=True)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.cli.routes.reading import routes_of
    from moe_trace.read.routes.cache.simulate import expert_bytes_of, simulate
    from moe_trace.show.routes.cache import render_cache_json, render_cache_text

    sizes = parse_numbers("--experts-in-memory", arguments.experts_in_memory)
    policies: list[Any] = parse_names(arguments.policy)
    if arguments.steps < 0:
        raise UsageError(f"found --steps {arguments.steps}, expected a number from 0 on")
    routes, given = routes_of(arguments.file, arguments), arguments.expert_bytes
    found = simulate(
        routes,
        sizes,
        policies,
        shared=arguments.shared,
        together="token" if arguments.each_token else "forward",
        prefetch_by=arguments.prefetch,
        expert_bytes=expert_bytes_of(routes.model) if given is None else given,
        most_steps=arguments.steps or None,
    )
    if arguments.format == "json":
        print(render_cache_json(found), end="")
    else:
        print(render_cache_text(found, every_layer=arguments.layers), end="")
    return 0
