"""Exceptions raised to users: one base class, each with the exit code of the command line."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def deprecated(old: str, new: str) -> None:
    """Warn, at the caller's caller, that a name has changed."""
    warnings.warn(f"{old} is now {new}; the old name will go", DeprecationWarning, stacklevel=3)


class MoETraceError(Exception):
    """Base class. The message says what was found, what was expected, and what to do next."""

    exit_code = 1


class NoRoutersFound(MoETraceError):
    """The model has no Mixture-of-Experts router that a known contract can read."""

    exit_code = 3


class NothingRecorded(MoETraceError):
    """Routers were found, but no router call was recorded."""

    exit_code = 4


class TraceFileError(MoETraceError):
    """A trace file is missing, truncated, not JSON, written by another tool, or without moe_trace data."""

    exit_code = 5


class SchemaError(TraceFileError):
    """A trace contains moe_trace data of a schema version unknown to this release."""


class Interrupted(MoETraceError):
    """Ctrl-C ended a run; the message names what was kept."""

    exit_code = 130


class ProgramInterrupted(BaseException):
    """Ctrl-C ended a user's program, which already reported it; the process must end by that signal."""


class OutputError(MoETraceError):
    """A file could not be written: it exists, the disk is full, or the folder is read-only."""

    exit_code = 6


class UsageError(MoETraceError):
    """The arguments are invalid or incompatible."""

    exit_code = 2


class MissingPackage(UsageError, ImportError):
    """An optional package is not installed."""


def optional_package(name: str, feature: str, install: str) -> Any:
    """Import a package that only some features need.

    Args:
        name: module name, such as "pyarrow.parquet".
        feature: what needs it, as the subject of a sentence.
        install: argument for pip.

    Raises:
        MissingPackage: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackage(
            f"{feature} needs {package}, which is not installed; run: pip install {install}"
        ) from error
