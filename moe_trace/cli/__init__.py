"""The command line: one module per command, imported only when the command is used.

The module's docstring is the command's help, with an example as the last paragraph. A command module defines
`READS` (the arguments that name inputs, each with the file extension given to the copy of a piped input),
`add_arguments(parser)` and `run(arguments) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moe_trace.cli.pipes import abandon_stdout, prepare_streams, seekable_inputs
from moe_trace.data.display.tables import paragraph
from moe_trace.data.errors import MoETraceError, OutputError, ProgramInterrupted
from moe_trace.data.version import __version__

# name -> (module, summary line). Modules are imported late so that reading a trace never imports torch.
COMMANDS = {
    "run": ("run.command", "run a model or program and record its routing in a profiler trace"),
    "routers": ("routers", "list the routers that would be traced in a model"),
    "report": ("report", "report routing metrics, timings and findings of a trace"),
    "ask": ("ask", "answer common questions: imbalance, time spent in MoE layers, what to try"),
    "view": ("view", "show traces in TensorBoard's MoE tab, or one trace on its timeline"),
    "merge": ("merge", "merge the traces of a run's ranks into one, on one clock"),
    "reduce": ("reduce", "write the data that a report needs from a trace to a small file"),
    "diff": ("diff", "compare two traces and distinguish changes from noise"),
    "check": ("check", "check a trace with merged routing data for consistency"),
    "export": ("export", "export calls as CSV or Parquet, a Perfetto trace, or expert counts"),
    "placement": ("placement", "estimate the effect of another placement of experts over ranks"),
    "routes": ("routes.command", "check, compare and study which token went to which experts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    parser = command_parser(next((a for a in arguments_given if a in COMMANDS), None))
    arguments = parser.parse_args(arguments_given)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        with seekable_inputs(arguments, arguments.command.READS):
            code = int(arguments.command.run(arguments))
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
        sys.excepthook = lambda *_: None  # the interruption has already been reported
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        print("moe-trace: interrupted", file=sys.stderr)
        return 130


def _failed(message: str, code: int) -> int:
    with suppress(OSError):  # standard error may be closed
        print(f"moe-trace: error: {message}", file=sys.stderr)
    return code


def command_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser of `moe-trace` with one command's options; `command` is then its module."""
    parser = argparse.ArgumentParser(
        prog="moe-trace",
        description="Show what Mixture-of-Experts routers do, next to the kernels in a profiler trace.",
        epilog="Example: moe-trace run --model demo --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"moe-trace {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, (module, line) in COMMANDS.items():
        if name == chosen:
            add_command(commands, name, line, module)
        else:
            commands.add_parser(name, help=line)
    return parser


def add_command(commands: Any, name: str, line: str, module: str) -> argparse.ArgumentParser:
    """Add a command's parser to argparse's subparsers, and return it; `command` is then its module.

    Args:
        line: the summary line for the overview.
        module: name relative to this package. The last paragraph of its docstring is an example.
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
