"""Coverage: the share of a sum that could be joined, as a third state next to known and zero.

A kernel whose launch is not in the trace cannot be assigned to a layer. A sum without it is a lower bound and
is shown with its coverage; where less than `KNOWN_MIN` could be joined, no sum is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from moe_trace.data.compiled_graph import BY_COMPILER

KNOWN_MIN = 0.9
"""Minimum share, by number and by time, that must be joined for a sum to be given."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Number of items of one kind that were joined to their owner."""

    joined: int = 0
    total: int = 0
    joined_ns: int = 0
    total_ns: int = 0
    """Durations of joined and of all items, where they have any."""

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def share(self) -> float | None:
        """The smaller of the shares by number and by time; None if there was nothing to join."""
        if not self.total:
            return None
        by_time = self.joined_ns / self.total_ns if self.total_ns else 1.0
        return min(self.joined / self.total, by_time)

    @property
    def known(self) -> bool:
        """Whether a sum over the joined items is close enough to that over all."""
        return self.share is None or self.share >= KNOWN_MIN


@dataclass(frozen=True, kw_only=True)
class TimeCoverage:
    """Coverage of the data behind the times of a trace's router calls."""

    kernels: Coverage = Coverage()
    """Kernels, copies and memsets whose launch is in the trace."""
    launches: Coverage = Coverage()
    """Launches of kernels inside MoE layers whose kernel is in the trace."""
    calls: Coverage = Coverage()
    """Router calls whose ranges are in the trace, with operators inside."""
    backward: Coverage = Coverage()
    """Backward nodes whose forward operator is in the trace."""
    collectives: Coverage = Coverage()
    """Collectives of MoE layers whose kernels, or range on the backend's thread, are in the trace."""
    compiled: Coverage = Coverage()
    """Router calls inside compiled code whose kernels are named by the compiler's provenance."""
    unshared: Coverage = Coverage()
    """Kernels of those calls that were not fused across phases, layers or the rest of the model."""
    cpp_kernels: Coverage = Coverage()
    """Calls of compiled graphs on a CPU whose C++ kernels are in the trace."""

    def __add__(self, other: TimeCoverage) -> TimeCoverage:
        return TimeCoverage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def device_known(self) -> bool:
        """Whether device times can be given."""
        return self.kernels.known and self.launches.known and self.calls.known

    @property
    def provenance(self) -> Provenance | None:
        """Reliability of times inside compiled code; None if there are none."""
        if not self.unshared.total_ns:
            return None
        return Provenance(
            unknown_share=1 - self.compiled.joined / self.compiled.total,
            shared_share=1 - self.unshared.joined_ns / self.unshared.total_ns,
        )

    def items(self) -> list[tuple[str, Coverage]]:
        """Return (name, coverage) pairs in the order of the fields."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Shares of the times inside compiled code that the compiler's provenance leaves open."""

    unknown_share: float
    """Share of router calls inside compiled code whose kernels do not match it."""
    shared_share: float
    """Share of the other calls' kernel time in kernels fused from several phases, layers or the rest of the
    model, which is divided into equal parts."""

    def __str__(self) -> str:
        return (
            f"{BY_COMPILER} ({_percent(self.shared_share)} of the kernel time shared between parts of the "
            f"model, {_percent(self.unknown_share)} of the calls unknown)"
        )


_LOSS_WORDS = {
    "kernels": ("kernels, copies and memsets have a launch", "device times"),
    "launches": ("kernel launches inside MoE layers have a kernel", "device times"),
    "calls": ("router calls have their ranges in the trace, with operators inside", "device times"),
    "backward": ("backward nodes have a forward operator", "backward times"),
    "collectives": ("collectives of MoE layers have their kernels or their work", "times of collectives"),
    "compiled": (
        "router calls inside compiled code have kernels that follow the compiler's provenance",
        "their phases",
    ),
    "cpp_kernels": (
        "calls of compiled code show Inductor's C++ kernels (for that set "
        "torch._inductor.config.cpp.enable_kernel_profile = True, or the variable "
        "TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE=1, before the model is compiled)",
        "their phases",
    ),
}


def loss_sentence(name: str, coverage: Coverage) -> str | None:
    """Describe what was not joined; None if nothing was lost."""
    share = coverage.share
    if share is None or share >= 1:
        return None
    events, figures = _LOSS_WORDS[name]
    by_time = (
        f" ({_percent(coverage.joined_ns / coverage.total_ns)} of their time)" if coverage.total_ns else ""
    )
    return f"{_percent(coverage.joined / coverage.total)} of the {coverage.total:,} {events}{by_time}" + (
        f": {figures} leave out the others"
        if coverage.known
        else f": {figures} are not given, for less than {100 * KNOWN_MIN:.0f} % could be joined"
    )


def coverage_notes(parts: Sequence[TimeCoverage]) -> list[str]:
    """Return one sentence for each kind of loss, and one on fused kernels."""
    whole = sum(parts, TimeCoverage())
    if not whole.cpp_kernels.known:  # the reason why none was joined
        whole = replace(whole, compiled=Coverage())
    notes = [loss_sentence(name, coverage) for name, coverage in whole.items() if name in _LOSS_WORDS]
    found = whole.provenance
    if found is not None:
        notes.append(
            f"phases inside compiled code are told {BY_COMPILER}; {_percent(found.shared_share)} of their "
            "kernel time is of kernels fused from several phases, layers or the rest of the model, and "
            "counts in equal parts"
        )
    return [note for note in notes if note is not None]


def _percent(share: float) -> str:
    """Format a share; only all is 100 %, and only nothing 0 %."""
    text = f"{100 * share:.0f}" if share == 1 or 0.01 <= share <= 0.99 else f"{100 * share:.2g}"
    return f"{'99.9' if share < 1 and float(text) == 100 else text} %"
