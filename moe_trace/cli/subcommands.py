"""A command's parser, of `moe-trace` and of `moe-trace routes` alike: its help is the class's docstring."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from moe_trace.data.display.tables import paragraph


def add_command(commands: Any, name: str, line: str, command: Any) -> argparse.ArgumentParser:
    """Add a command's parser to argparse's subparsers, and return it.

    Args:
        line: one line for the overview.
        command: its docstring's last paragraph is an example.
    """
    *description, example = inspect.cleandoc(command.__doc__ or line).split("\n\n")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description="\n\n".join(map(paragraph, description)),
        epilog=paragraph(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return parser
