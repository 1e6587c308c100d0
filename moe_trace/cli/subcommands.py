"""A command's parser, of `moe-trace` and of `moe-trace routes` alike: its help is the class's docstring."""

from __future__ import annotations

import argparse
import importlib
import inspect
from typing import Any

from moe_trace.data.display.tables import paragraph


def load_command(place: str) -> Any:
    """The command of a module of this package: `report:ReportCommand`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"moe_trace.cli.{module}"), name)()


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
