"""The command line: each command is a small class in a module of its own, imported only when it is asked for.

A command class has a docstring (its help; the last paragraph is an example), `reads` (the arguments that name
what is read, each with the ending of a copy of what comes from a pipe), `add_arguments(parser)` and
`run(arguments) -> exit code`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moe_trace.cli.pipes import abandon_stdout, prepare_streams, seekable_inputs
from moe_trace.cli.subcommands import add_command, load_command
from moe_trace.data.errors import MoETraceError, OutputError, ProgramInterrupted
from moe_trace.data.version import __version__

# name -> (module and class, one line for the overview); modules are imported late, so that reading a trace
# never imports torch.
COMMANDS = {
    "run": ("run.command:RunCommand", "run a model and record its routing in a profiler trace"),
    "routers": ("routers:RoutersCommand", "list what would be traced in a model"),
    "report": ("report:ReportCommand", "what a trace says about the routing"),
    "ask": ("ask:AskCommand", "questions answered: imbalance, MoE's share, what to try"),
    "view": ("view:ViewCommand", "start TensorBoard on a folder and its MoE tab"),
    "merge": ("merge:MergeCommand", "the traces of a run's ranks as one, on one clock"),
    "reduce": ("reduce:ReduceCommand", "what a report needs of a trace, in a small file"),
    "diff": ("diff:DiffCommand", "what changed between two traces, and what is noise"),
    "check": ("check:CheckCommand", "whether a merged trace keeps its promises"),
    "export": ("export:ExportCommand", "calls as CSV or Parquet, Perfetto, expert counts"),
    "placement": ("placement:PlacementCommand", "what another placement of experts would give"),
    "routes": ("routes:RoutesCommand", "which token went where: check, compare, study"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    chosen = next((a for a in arguments_given if a in COMMANDS), None)
    parser, command = _parser(chosen)
    arguments = parser.parse_args(arguments_given)
    if command is None:
        parser.print_help()
        return 2
    try:
        with seekable_inputs(arguments, command.reads):
            code = int(command.run(arguments))
        sys.stdout.flush()
        return code
    except MoETraceError as error:
        return _failed(str(error), error.exit_code)
    except BrokenPipeError:  # `moe-trace report ... | head`
        abandon_stdout()
        return 0
    except OSError as error:
        if error.filename is None:  # a full disk behind standard output
            abandon_stdout()
            return _failed(
                f"standard output cannot be written ({error.strerror or error})", OutputError.exit_code
            )
        return _failed(f"{error.filename}: {error.strerror}; choose another file", OutputError.exit_code)
    except ProgramInterrupted:
        sys.excepthook = lambda *_: None  # it has been told
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        print("moe-trace: interrupted", file=sys.stderr)
        return 130


def _failed(message: str, code: int) -> int:
    with suppress(OSError):  # nobody may be there to read it
        print(f"moe-trace: error: {message}", file=sys.stderr)
    return code


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="moe-trace",
        description="See what a Mixture-of-Experts router does, beside the kernels of a profiler trace.",
        epilog="Example: moe-trace run --model demo --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"moe-trace {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    command = None
    for name, (place, line) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=line)
            continue
        command = load_command(place)
        add_command(commands, name, line, command)
    return parser, command
