"""The output folder of a run."""

from __future__ import annotations

from pathlib import Path

from moe_trace.data.errors import OutputError
from moe_trace.data.routes.reader import SUFFIX
from moe_trace.read.file.folder import REDUCED_SUFFIX

_TRACES = ("*.pt.trace.json", "*.pt.trace.json.gz")
OUTPUT_PATTERNS = (
    *_TRACES,
    f"*{REDUCED_SUFFIX}",
    f"*{SUFFIX}",
    "events.out.tfevents.*",
    "rank*/events.out.tfevents.*",
)


def files_in(folder: Path) -> tuple[Path, ...]:
    """Return the files that a run wrote there."""
    return tuple(sorted(file for pattern in OUTPUT_PATTERNS for file in folder.glob(pattern)))


def traces_in(folder: Path) -> list[Path]:
    """Return the traces that a run wrote there."""
    return sorted(file for pattern in _TRACES for file in folder.glob(pattern))


def claim_folder(folder: Path, *, force: bool) -> list[Path]:
    """Create the folder, and return the files of an earlier run in it.

    Raises:
        OutputError: the folder holds files and `force` was not given, it cannot be created, or its name is
            not UTF-8, so that torch cannot write to it.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{folder}: torch.profiler and TensorBoard write only under names that are UTF-8; choose another "
            "folder with --out"
        ) from error
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; give a folder with --out")
        earlier = list(files_in(folder))
        if folder.exists() and any(folder.iterdir()) and not force:
            raise OutputError(
                f"{folder} exists and is not empty; add --force to replace the run in it, "
                "or choose another folder with --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return earlier
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
