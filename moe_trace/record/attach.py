"""Make a profiler merge the recordings of tracers into each trace that it writes."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_trace.data.errors import MoETraceError, OutputError
from moe_trace.data.files import whole_file
from moe_trace.find.contracts.modules import class_name
from moe_trace.record.forward.ranges import note_profiler, profiler_is_recording
from moe_trace.timeline.merge import compress, merge_in_place

_TRACERS = "_moe_trace_tracers"  # profiler attribute: attached tracer -> its `follow` callback
_OWN_METHODS = "_moe_trace_own_methods"  # profiler attribute: methods that others had patched before

_PATCHED = ("start", "step", "stop", "export_chrome_trace")

Tracer = Any
"""A `MoETracer`; `Any`, because its module imports this one."""


Follow = Callable[[Any, str], None]
"""Callback that receives a profiler and the name of the method being called on it."""


def attach_tracer(prof: Any, tracer: Tracer, *, follow: Follow | None = None) -> None:
    """Make `prof.export_chrome_trace` merge what `tracer` recorded. Several tracers may be attached.

    Args:
        follow: callback for the profiler's steps; None if the user asked to attach. If not None, a trace that
            cannot be merged is written unchanged without raising, as its owner may not know of moe_trace.
    """
    note_profiler(prof)
    tracers = getattr(prof, _TRACERS, None)
    if tracers is None:
        _wrap_methods(prof)
        tracers = getattr(prof, _TRACERS)
    known = tracer in tracers
    tracers[tracer] = follow
    if not known:
        mark_begin(prof)


def _wrap_methods(prof: Any) -> None:
    setattr(prof, _OWN_METHODS, {name: prof.__dict__[name] for name in _PATCHED if name in prof.__dict__})
    setattr(prof, _TRACERS, {})
    # The host does not see forwards that run inside graphs, so tracers need to know where a step ends and
    # where a trace begins and ends.
    for name in _PATCHED[:3]:
        method = getattr(prof, name, None)
        if method is not None:
            setattr(prof, name, _wrap_marking(prof, name, method))
    export = prof.export_chrome_trace

    @functools.wraps(export)
    def export_and_merge(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        _export_or_warn(lambda plain: export(plain, *args, **kwargs), path, prof)

    prof.export_chrome_trace = export_and_merge


def detach_tracer(prof: Any, tracer: Tracer) -> None:
    """Undo `attach_tracer`. Detaching the last tracer restores the profiler's original methods."""
    tracers = getattr(prof, _TRACERS, None)
    if tracers is None or tracer not in tracers:
        return
    del tracers[tracer]
    if not tracers:
        methods = getattr(prof, _OWN_METHODS)
        for name in (*_PATCHED, _TRACERS, _OWN_METHODS):
            prof.__dict__.pop(name, None)
        prof.__dict__.update(methods)


def _wrap_marking(prof: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def mark_and_call(*args: Any, **kwargs: Any) -> Any:
        recorded, action = profiler_is_recording(), getattr(prof, "current_action", None)
        for tracer, follow in attached_tracers(prof).items():
            tracer.mark_graphs()
            if follow is not None:
                follow(prof, name)
        result = method(*args, **kwargs)
        if not recorded or action == torch.profiler.ProfilerAction.RECORD_AND_SAVE:
            mark_begin(prof)
        return result

    return mark_and_call


def mark_begin(prof: Any) -> None:
    """Exclude from the trace whatever ran before it began."""
    if profiler_is_recording():
        for tracer in attached_tracers(prof):
            tracer.mark_graphs(profiled=False)


def attached_tracers(prof: Any) -> dict[Tracer, Follow | None]:
    """Return the tracers attached to a profiler and their `follow` callbacks (None: attached by the user)."""
    return dict(getattr(prof, _TRACERS, {}))


class _NotBegun(OutputError):
    """The output file cannot be created. The trace, which can be exported only once, is not exported yet."""


def _export_or_warn(export: Callable[[str], None], path: str | os.PathLike[str], prof: Any) -> None:
    tracers = attached_tracers(prof)
    by_user = None in tracers.values()
    if not by_user and not any(any(tracer.calls_by_router().values()) for tracer in tracers):
        export(os.fspath(path))
        return
    try:
        _export(export, Path(path), prof)
    except OutputError as error:
        if by_user:
            raise
        warnings.warn(f"a trace has no routing: {error}", RuntimeWarning, stacklevel=4)
        if isinstance(error, _NotBegun):
            export(os.fspath(path))


def _export(export: Callable[[str], None], path: Path, prof: Any) -> None:
    failure: OSError | Warning | None = None
    begun = False
    try:
        with whole_file(path) as target:
            begun = True
            plain = target.with_suffix("") if path.suffix == ".gz" else target
            export(str(plain))
            _keep_others(plain, path)
            _require_complete(plain, path)
            try:
                _merge_or_warn(plain, path, prof)
            except (OSError, Warning) as error:  # the merge restored the trace: deliver it, then raise
                failure = error
            if plain != target:
                compress(plain, target)
                plain.unlink()
    except OutputError as error:
        raise error if begun else _NotBegun(str(error)) from error.__cause__
    if isinstance(failure, Warning):  # which the user turned into an error
        raise failure
    if failure is not None:
        raise OutputError(
            f"{path}: the trace was written, but the routing could not be added ({failure.strerror}); "
            "free some space, then call moe_trace.merge_into(path, tracer.samples())"
        ) from failure


def _keep_others(plain: Path, path: Path) -> None:
    """Move files that the profiler's export wrote under other names to the folder of `path`."""
    for other in plain.parent.iterdir():
        if other != plain and other.suffix != ".tmp":  # left by Kineto after a failed write
            shutil.move(other, path.parent / other.name)


def _require_complete(plain: Path, path: Path) -> None:
    """Raise `OutputError` if the file is incomplete: Kineto only logs a failed write."""
    size = plain.stat().st_size if plain.exists() else 0
    if size:
        with plain.open("rb") as file:
            first = file.read(1)
            file.seek(max(0, size - 64))
            last = file.read().rstrip()[-1:]
        if first != b"{" or last == b"}":
            return
    raise OutputError(
        f"{path}: the profiler wrote {'an incomplete trace' if size else 'nothing'}; is the disk full? "
        "Nothing was left half-written: free some space or choose another folder"
    )


def _merge_or_warn(plain: Path, path: Path, prof: Any) -> None:
    """Merge the recordings; if that is impossible, warn and keep the trace as it is."""
    tracers = _contributing(prof)
    try:
        merged = merge_in_place(
            plain,
            [t.recording(trace=path if t is tracers[0] else None) for t in tracers],
            tracks=tracers[0].tracks,
            activities=_activities(prof),
        )
    except MoETraceError as error:
        warnings.warn(f"the trace was written without routing: {error}", RuntimeWarning, stacklevel=7)
        return
    for tracer, placed in zip(tracers, merged.placed, strict=True):
        tracer.accept(placed, merged.lost, path)


def _contributing(prof: Any) -> list[Tracer]:
    """Return explicitly attached tracers, then others that add a router: a model may have several tracers."""
    tracers = attached_tracers(prof)
    calls = {tracer: sum(tracer.calls_by_router().values()) for tracer in tracers}
    chosen = [tracer for tracer, follow in tracers.items() if follow is None]
    for tracer in chosen:
        if not calls[tracer]:
            warnings.warn(_nothing_recorded(tracer), RuntimeWarning, stacklevel=8)
    known = {site.router for tracer in chosen if calls[tracer] for site in tracer.sites}
    for tracer in sorted((t for t in tracers if t not in chosen), key=calls.__getitem__, reverse=True):
        routers = {site.router for site in tracer.sites}
        if calls[tracer] and not routers <= known:
            chosen.append(tracer)
            known |= routers
    return chosen


def _activities(prof: Any) -> frozenset[str] | None:
    """Return the names of the activities that the profiler records, or None if it does not expose them."""
    activities = getattr(prof, "activities", None)
    return None if activities is None else frozenset(activity.name for activity in activities)


def _nothing_recorded(tracer: Tracer) -> str:
    found = f"found {len(tracer.sites)} routers in {class_name(tracer.model)}, but recorded no call"
    if tracer.forwards_seen == 0:
        return f"{found}: the model was not run while the tracer was active"
    if tracer.forwards_recorded == 0:
        return (
            f"{found}: every={tracer.every} and warmup={tracer.warmup} left out all of the "
            f"{tracer.forwards_seen} forwards; lower them, or run more steps"
        )
    return f"{found} in {tracer.forwards_recorded} forwards: its MoE layers did not run through their modules"
