"""Check, compare and study which token went to which experts, from files of routes.

`moe-trace run --routes` and `MoETracer(model, routes=True)` record them; captures of vLLM, SGLang, verl
and Megatron can be read as well.

Example: moe-trace routes check runs/demo/trace.routes.npz
"""

from __future__ import annotations

import argparse

from moe_trace.cli import add_command

COMMANDS = {
    "check": ("routes.check", "what is wrong with captured routes"),
    "study": ("routes.study", "which experts, after which, for what"),
    "cache": ("routes.cache", "what keeping some experts in memory gives"),
    "view": ("routes.view", "the text in the colours of its experts"),
    "diff": ("routes.diff", "the same tokens under several routings"),
    "import": ("routes.importing", "routes that another tool captured"),
    "export": ("routes.exporting", "routes for other tools"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands. All of them are imported here, so each defers its heavy imports to `run`."""
    commands = parser.add_subparsers(
        metavar="COMMAND", title="commands", required=True, help="what to do with them"
    )
    for name, (module, line) in COMMANDS.items():
        add_command(commands, name, line, module)
