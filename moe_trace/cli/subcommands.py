"""A command's parser, of `moe-trace` and of `moe-trace routes` alike: its help is its module's docstring."""

from __future__ import annotations

import argparse
import importlib
import inspect
from typing import Any

from moe_trace.data.display.tables import paragraph


def add_command(commands: Any, name: str, line: str, module: str) -> argparse.ArgumentParser:
    """Add a command's parser to argparse's subparsers, and return it; `command` is then its module.

    Args:
        line: one line for the overview.
        module: below this package; the last paragraph of its docstring is an example.
    """
    command: Any = importlib.import_module(f"moe_trace.cli.{module}")
    *description, example = inspect.cleandoc(command.__doc__ or line).split("\n\n")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description="\n\n".join(map(paragraph, description)),
        epilog=paragraph(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    command.add_arguments(parser)
    return parser
