"""Progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    shown: bool | None = None, *, in_bytes: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that takes a description, the amount done and the total.

    Args:
        shown: None shows it on a terminal or in a notebook; elsewhere it is printed once, at the end.
        in_bytes: count bytes and show the remaining time; else count steps and show the elapsed time.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    shown = shown if shown is not None else console.is_terminal or console.is_jupyter
    counts = (
        (DownloadColumn(), TimeRemainingColumn()) if in_bytes else (MofNCompleteColumn(), TimeElapsedColumn())
    )
    columns = (TextColumn("{task.description:>18}"), BarColumn(), *counts)
    with Progress(*columns, console=console, transient=console.is_terminal, disable=not shown) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
