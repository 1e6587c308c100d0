"""Import routes captured by another tool.

Reads arrays from vLLM, SGLang and verl (.npy, .npz with routed_experts, .safetensors), responses of their
servers (.json, or .jsonl with one per line), Megatron's router trace (.jsonl), dumps of SGLang's expert
distribution recorder (.pt, per_token), and files written by `export`.

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
    add("capture", metavar="FILE", help="captured file")
    add("--num-experts", type=int, metavar="E", help="number of experts per layer (default: from the ids)")
    add("--layers", type=int, metavar="L", help="number of layers, if the ids are flat, as from SGLang")
    add("--top-k", type=int, metavar="K", help="number of experts per token, if the ids are flat")
    add("--as", dest="ending", metavar=".json", help="read the file as if it had this extension")
    add_output(parser, "FILE", "routes file to write", required=True)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.data.display.json import attributes
    from moe_trace.read.routes.interchange.files import import_routes

    refuse_to_replace(arguments.out, force=arguments.force, inputs=[arguments.capture])
    if (arguments.ending or Path(arguments.capture).suffix) == ".pt":
        from moe_trace.integrations.sglang.dumps import routes_of_dump

        capture = routes_of_dump(arguments.capture)
        routes, notes = capture.routes(arguments.capture, arguments.num_experts), capture.notes
    else:
        options = attributes(arguments, "num_experts", "layers", "top_k", "ending")
        routes, notes = import_routes(arguments.capture, **options)
    routes.save(arguments.out)
    shape = " x ".join(f"{size:,}" for size in routes.expert_ids.shape)
    print(f"{shape} ids (tokens x layers x top-k), {int(routes.padding.sum()):,} tokens of padding")
    for note in notes:
        print(f"moe-trace: note: {note}", file=sys.stderr)
    print(f"wrote {arguments.out}", file=sys.stderr)
    return 0
