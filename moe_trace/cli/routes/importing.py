"""Read the routes that another tool captured.

Arrays of vLLM, SGLang and verl (.npy, .npz with routed_experts, .safetensors), responses of their servers
(.json, or .jsonl with one per line), Megatron's router trace (.jsonl), SGLang's recorder of expert loads
(.pt, per_token), and files written by `export`.

Example: moe-trace routes import routed_experts.npy --num-experts 64 --out vllm.routes.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.cli.arguments import add_output, refuse_to_replace

READS = {"capture": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("capture", metavar="FILE", help="what was captured")
    add("--num-experts", type=int, metavar="E", help="experts of each layer; default: what the ids say")
    add("--layers", type=int, metavar="L", help="layers of ids that came flat, as SGLang's do")
    add("--top-k", type=int, metavar="K", help="experts per token of ids that came flat")
    add("--as", dest="ending", metavar=".json", help="read it as a file of this ending")
    add_output(parser, "FILE", "the file of routes to write", required=True)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.data.display.json import attributes
    from moe_trace.read.routes.interchange.files import import_routes

    refuse_to_replace(arguments.out, force=arguments.force, inputs=[arguments.capture])
    if (arguments.ending or Path(arguments.capture).suffix) == ".pt":
        from moe_trace.integrations.sglang.dumps import routes_of_dump

        capture = routes_of_dump(arguments.capture)
        routes, notes = capture.routes(arguments.capture, arguments.num_experts), capture.notes
    else:
        given = attributes(arguments, "num_experts", "layers", "top_k", "ending")
        routes, notes = import_routes(arguments.capture, **given)
    routes.save(arguments.out)
    shape = " x ".join(f"{size:,}" for size in routes.expert_ids.shape)
    print(f"{shape} ids (tokens x layers x top-k), {int(routes.padding.sum()):,} tokens of padding")
    for note in notes:
        print(f"moe-trace: note: {note}", file=sys.stderr)
    print(f"wrote {arguments.out}", file=sys.stderr)
    return 0
