"""`moe-trace routes`: commands on files of routes. A command of it is a class as those of `moe-trace` are.

All their modules are imported together, so each imports what it reads with when it runs.
"""

from __future__ import annotations

import argparse

from moe_trace.cli.subcommands import add_command, load_command

COMMANDS = {
    "check": ("routes.check:CheckRoutesCommand", "what is wrong with captured routes"),
    "study": ("routes.study:StudyRoutesCommand", "which experts, after which, for what"),
    "cache": ("routes.cache:CacheRoutesCommand", "what keeping some experts in memory gives"),
    "view": ("routes.view:ViewRoutesCommand", "the text in the colours of its experts"),
    "diff": ("routes.diff:DiffRoutesCommand", "the same tokens under several routings"),
    "import": ("routes.interchange:ImportRoutesCommand", "routes that another tool captured"),
    "export": ("routes.interchange:ExportRoutesCommand", "routes for other tools"),
}


class RoutesCommand:
    """Check, compare and study which token went to which experts, from files of routes.

    `moe-trace run --routes` and `MoETracer(model, routes=True)` record them; captures of vLLM, SGLang, verl
    and Megatron are read too.

    Example: moe-trace routes check runs/demo/trace.routes.npz
    """

    def __init__(self) -> None:
        self.reads: dict[str, str] = {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the commands."""
        commands = parser.add_subparsers(
            metavar="COMMAND", title="commands", required=True, help="what to do with them"
        )
        for name, (place, line) in COMMANDS.items():
            command = load_command(place)
            add_command(commands, name, line, command).set_defaults(chosen_command=command)
            self.reads |= command.reads

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command that was named."""
        return int(arguments.chosen_command.run(arguments))
