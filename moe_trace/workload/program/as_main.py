"""Run a program like `python program.py` or `python -m module`: `__main__`, arguments, paths, exit status."""

from __future__ import annotations

import importlib.util
import io
import os
import runpy
import sys
import traceback
import types
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

from moe_trace.data.errors import UsageError

INTERRUPTED = 130
_LAUNCHERS = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "torchrun": "torchrun",
    "accelerate": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "deepspeed": "deepspeed",
}


@dataclass(frozen=True)
class Program:
    """A file, or a module by its name, and its arguments."""

    target: str
    arguments: Sequence[str] = ()
    is_module: bool = False

    @property
    def name(self) -> str:
        """Name for the folder of its run."""
        return self.target if self.is_module else Path(self.target).stem

    def check(self) -> None:
        """Check that the program exists and can be recorded.

        Raises:
            UsageError: there is no such program, or it is a launcher of the processes to be watched.
        """
        name = self.target if self.is_module else Path(self.target).name
        if name in _LAUNCHERS:
            raise UsageError(
                f"{name} starts other processes, which would not be recorded; start it outside: "
                f"{_LAUNCHERS[name]} [options] -m moe_trace run SCRIPT ..."
            )
        if not self.is_module and not Path(self.target).exists():
            raise UsageError(f"found no file {self.target}, expected a Python program")

    def run(self) -> int:
        """Run the program to its end, and return the exit status that Python would have; 130 after Ctrl-C.

        The program remains `__main__` afterwards, for code that runs when the process exits.
        """
        try:
            self._run()
        except SystemExit as end:
            if end.code is not None and not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
            return int(end.code) if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            _report(error)
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        return 0

    def _run(self) -> None:
        if not sys.flags.safe_path:  # otherwise Python adds no folder
            sys.path[0] = os.getcwd() if self.is_module else str(Path(self.target).resolve().parent)
        if self.is_module:
            spec = _spec_of(self.target)
            assert spec.origin is not None and spec.loader is not None
            code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
            self._execute(code, spec.origin, spec.origin, spec)
            return
        sys.argv = [self.target, *self.arguments]
        if os.path.isdir(self.target) or zipfile.is_zipfile(self.target):
            runpy.run_path(self.target, run_name="__main__")
            return
        path = os.path.abspath(self.target)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        self._execute(code, self.target, path, None)

    def _execute(self, code: types.CodeType, argv0: str, path: str, spec: ModuleSpec | None) -> None:
        sys.argv = [argv0, *self.arguments]
        main = types.ModuleType("__main__")
        loader = SourceFileLoader("__main__", path) if spec is None else spec.loader
        main.__dict__.update(__file__=path, __spec__=spec, __loader__=loader, __cached__=None)
        main.__dict__.update(__builtins__=__builtins__, __package__=spec and spec.parent)
        if sys.version_info < (3, 14):
            main.__annotations__ = {}
        sys.modules["__main__"] = main
        exec(code, main.__dict__)


def _spec_of(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.loader is None or spec.origin is None:
        raise SystemExit(f"{sys.executable}: No module named {name}")
    return spec


def _report(error: BaseException) -> None:
    """Report an error as Python does, by the program's own hook if set, and without our own stack frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    except BaseException:
        traceback.print_exception(type(error), error, trace)
