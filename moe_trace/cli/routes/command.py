"""Check, compare and study which token went to which experts, from routes files.

Routes are recorded by `moe-trace run --routes` and `MoETracer(model, routes=True)`; captures from vLLM,
SGLang, verl and Megatron can be read as well.

Example: moe-trace routes check runs/demo/trace.routes.npz
"""

from __future__ import annotations

import argparse

from moe_trace.cli import add_command

COMMANDS = {
    "check": ("routes.check", "check captured routes for errors"),
    "study": ("routes.study", "study co-activation, reuse and specialisation of experts"),
    "cache": ("routes.cache", "simulate keeping some of the experts in fast memory"),
    "view": ("routes.view", "write a web page with the text coloured by expert"),
    "diff": ("routes.diff", "compare routings of the same tokens"),
    "import": ("routes.importing", "import routes captured by another tool"),
    "export": ("routes.exporting", "export routes for other tools"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands. All of them are imported here, so each defers its heavy imports to `run`."""
    commands = parser.add_subparsers(
        metavar="COMMAND", title="commands", required=True, help="what to do with the routes"
    )
    for name, (module, line) in COMMANDS.items():
        add_command(commands, name, line, module)
