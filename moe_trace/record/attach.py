"""Make a profiler merge what tracers recorded into each trace that it writes."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_trace.data.errors import MoETraceError, OutputError
from moe_trace.data.files import whole_file
from moe_trace.find.contracts.modules import class_name
from moe_trace.record.forward.ranges import note_profiler, profiler_is_recording
from moe_trace.timeline.merge import compress, merge_in_place

_TRACERS = "_moe_trace_tracers"  # attribute of a profiler: the tracers attached to it
_OWN = "_moe_trace_own_methods"  # those of them that it had in itself, as when patched by others

_PATCHED = ("start", "step", "stop", "export_chrome_trace")

Tracer = Any
"""A `MoETracer`, which itself imports this module."""


def attach_tracer(prof: Any, tracer: Tracer) -> None:
    """Make `prof.export_chrome_trace` merge what `tracer` recorded. Several tracers may be attached."""
    note_profiler(prof)
    tracers = getattr(prof, _TRACERS, None)
    if tracers is not None:
        if tracer not in tracers:
            tracers.append(tracer)
            _mark_begin(prof)
        return
    own = {name: prof.__dict__[name] for name in _PATCHED if name in prof.__dict__}
    setattr(prof, _TRACERS, [tracer])
    setattr(prof, _OWN, own)
    _mark_steps(prof)
    _mark_begin(prof)
    export = prof.export_chrome_trace

    @functools.wraps(export)
    def export_and_merge(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        _export(lambda plain: export(plain, *args, **kwargs), Path(path), prof)

    prof.export_chrome_trace = export_and_merge


def detach_tracer(prof: Any, tracer: Tracer) -> None:
    """Undo `attach_tracer`: with its last tracer gone, the profiler has the methods that it had before."""
    tracers = getattr(prof, _TRACERS, None)
    if tracers is None or tracer not in tracers:
        return
    tracers.remove(tracer)
    if not tracers:
        own = getattr(prof, _OWN)
        for name in (*_PATCHED, _TRACERS, _OWN):
            prof.__dict__.pop(name, None)
        prof.__dict__.update(own)


def _mark_steps(prof: Any) -> None:
    """Forwards that run inside graphs are unseen by the host: tell the tracers where a step ends, and where
    a trace begins and ends."""
    for name in _PATCHED[:3]:
        method = getattr(prof, name, None)
        if method is not None:
            setattr(prof, name, _marking(prof, method))


def _marking(prof: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def mark_and_call(*args: Any, **kwargs: Any) -> Any:
        recorded, action = profiler_is_recording(), getattr(prof, "current_action", None)
        for tracer in attached_tracers(prof):
            tracer.mark_graphs()
        result = method(*args, **kwargs)
        if not recorded or action == torch.profiler.ProfilerAction.RECORD_AND_SAVE:
            _mark_begin(prof)
        return result

    return mark_and_call


def _mark_begin(prof: Any) -> None:
    """What ran before a trace began is not part of it."""
    if profiler_is_recording():
        for tracer in attached_tracers(prof):
            tracer.mark_graphs(profiled=False)


def attached_tracers(prof: Any) -> Sequence[Tracer]:
    """The tracers attached to a profiler."""
    return tuple(getattr(prof, _TRACERS, ()))


def _export(export: Callable[[str], None], path: Path, prof: Any) -> None:
    failure: OSError | None = None
    with whole_file(path) as target:
        plain = target.with_suffix("") if path.suffix == ".gz" else target
        export(str(plain))
        _require_complete(plain, path)
        try:
            _merge_or_warn(plain, path, prof)
        except OSError as error:  # the merge put the trace back as it was: deliver that, then say so
            failure = error
        if plain != target:
            compress(plain, target)
            plain.unlink()
    if failure is not None:
        raise OutputError(
            f"{path}: the trace was written, but the routing could not be added ({failure.strerror}); "
            "free some space, then call moe_trace.merge_into(path, tracer.samples())"
        ) from failure


def _require_complete(plain: Path, path: Path) -> None:
    """Kineto only logs a failed write, so the file itself must tell."""
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
    """Merge; but a trace that cannot be merged is still the user's trace, and is kept as it is."""
    tracers = attached_tracers(prof)
    for tracer in tracers:
        if not any(tracer.calls_by_router().values()):
            warnings.warn(_nothing_recorded(tracer), RuntimeWarning, stacklevel=6)
    try:
        merged = merge_in_place(
            plain,
            [t.recording() for t in tracers],
            tracks=tracers[0].tracks,
            activities=_activities(prof),
        )
    except MoETraceError as error:
        warnings.warn(f"the trace was written without routing: {error}", RuntimeWarning, stacklevel=6)
        return
    for tracer, placed in zip(tracers, merged.placed, strict=True):
        tracer.accept(placed, merged.lost, path)


def _activities(prof: Any) -> frozenset[str] | None:
    """Names of what the profiler was asked to record; None for one that does not tell."""
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
