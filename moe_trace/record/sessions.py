"""Report the profiler sessions of this process, whoever starts them, to the active tracers.

Torch keeps no list of its profilers. While there are listeners, the four methods through which every session
begins are wrapped on torch's classes; a session that is already running is found among the live objects.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from moe_trace.find.private.torch_names import process_is_profiled
from moe_trace.record.attach import attach_tracer, attached_tracers, detach_tracer, mark_begin
from moe_trace.record.forward.ranges import profiler_is_recording
from moe_trace.record.forward.steps import Steps

Listener = Callable[[Any], None]
"""Method called with each profiler, possibly several times: when it starts, steps or records."""

_low_level: type = getattr(torch.profiler, "_KinetoProfile", torch.profiler.profile)
_autograd = torch.autograd.profiler.profile
_BEGINNINGS = (
    (torch.profiler.profile, "start"),
    (torch.profiler.profile, "step"),  # for one that started before the first listener
    (_low_level, "start_trace"),
    (_autograd, "__enter__"),
)
_lock = threading.RLock()
_listeners: list[weakref.WeakMethod[Listener]] = []
_originals: list[tuple[type, str, Any, Any]] = []
_latest: list[weakref.ref[Any]] = []
"""The profiler reported last: a process has one session at a time."""


def listen(listener: Listener) -> None:
    """Call `listener` for each profiler, and now for one that is recording. The reference is weak."""
    with _lock:
        if not _originals:
            _originals.extend(_wrap(owner, name) for owner, name in _BEGINNINGS)
        _listeners.append(weakref.WeakMethod(listener, _forget))
    for prof in _recording():
        _notify(prof, [listener])


def unlisten(listener: Listener) -> None:
    """Undo `listen`. Removing the last listener restores torch's classes."""
    reference = weakref.WeakMethod(listener)
    with _lock:
        if reference in _listeners:
            _forget(reference)


def _forget(reference: weakref.WeakMethod[Listener]) -> None:
    with _lock:
        _listeners.remove(reference)
        if _listeners:
            return
        for owner, name, original, wrapped in _originals:
            if owner.__dict__.get(name) is wrapped:  # otherwise it was wrapped again, and calls the original
                setattr(owner, name, original)
        _originals.clear()
        _latest.clear()


def _wrap(owner: type, name: str) -> tuple[type, str, Any, Any]:
    original = owner.__dict__[name]

    @functools.wraps(original)
    def notify_and_call(prof: Any, *args: Any, **kwargs: Any) -> Any:
        known, recorded = bool(attached_tracers(prof)), profiler_is_recording()
        _notify(prof)
        result = original(prof, *args, **kwargs)
        if not known and not recorded:  # from now on the profiler's own methods do that
            mark_begin(prof)
        return result

    setattr(owner, name, notify_and_call)
    return owner, name, original, notify_and_call


def _notify(prof: Any, listeners: list[Listener] | None = None) -> None:
    if listeners is None:
        _latest[:] = [weakref.ref(prof)]
        listeners = [method for method in (reference() for reference in _listeners) if method is not None]
    for listener in listeners:
        try:
            listener(prof)
        except Exception as error:  # the session is the user's and continues without us
            warnings.warn(f"the routing is not added to this profiler's traces: {error!r}", stacklevel=4)


def _recording() -> list[Any]:
    """Return the profiler of the current session, as a list that is empty without one."""
    if not process_is_profiled():
        return []
    known = [prof for prof in (reference() for reference in _latest) if prof is not None and _records(prof)]
    if known:
        return known
    kinds = (_low_level, _autograd)
    found = [obj for obj in gc.get_objects() if issubclass(type(obj), kinds) and _records(obj)]
    _latest[:] = [weakref.ref(obj) for obj in found if isinstance(obj, _low_level)] or map(weakref.ref, found)
    return [prof for prof in (reference() for reference in _latest) if prof is not None]


def _records(prof: Any) -> bool:
    session = getattr(prof, "profiler", None) if isinstance(prof, _low_level) else prof
    return bool(getattr(session, "entered", False)) and getattr(session, "kineto_results", None) is None


class Sessions:
    """The profilers whose traces receive one tracer's recording.

    Args:
        auto: whether to attach to every profiler that records while the tracer is active.
    """

    def __init__(self, tracer: Any, steps: Steps, *, auto: bool) -> None:
        self._tracer, self._steps, self._auto = tracer, steps, auto
        self._detached = weakref.WeakSet[Any]()

    def start(self) -> None:
        """Start listening for profilers, when the tracer becomes active."""
        if self._auto:
            listen(self._on_profiler)

    def stop(self) -> None:
        """Stop listening. Profilers seen so far stay attached, since they may be exported later."""
        unlisten(self._on_profiler)

    def attach(self, prof: Any) -> None:
        """Attach to a profiler at the user's request."""
        self._detached.discard(prof)
        self._steps.profiler = prof
        attach_tracer(prof, self._tracer)

    def detach(self, prof: Any) -> None:
        """Detach from a profiler, and do not attach to it automatically again."""
        self._detached.add(prof)
        detach_tracer(prof, self._tracer)
        self._steps.leave(prof)

    def _on_profiler(self, prof: Any) -> None:
        if prof not in self._detached and self._tracer not in attached_tracers(prof):
            attach_tracer(prof, self._tracer, follow=self._steps.follow)
            self._steps.follow(prof, "start")
