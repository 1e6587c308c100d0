"""Which calls a question is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Recording, RouterInfo, Stage


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Empty sets select everything."""

    layers: frozenset[str] = frozenset()
    """Layer indices (as text), labels or module paths."""
    steps: frozenset[int] = frozenset()
    stages: frozenset[Stage] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.layers or self.steps or self.stages)

    def takes_router(self, router: RouterInfo) -> bool:
        """Whether the router is among the selected."""
        return not self.layers or bool({str(router.layer), router.site, router.name} & self.layers)

    def takes_time(self, step: int, stage: Stage) -> bool:
        """Whether the filter selects that stage of that step."""
        return (not self.steps or step in self.steps) and (not self.stages or stage in self.stages)

    def narrow(self, recording: Recording) -> Recording:
        """The recording with the selected routers and calls, of which there may be none."""
        if not self:
            return recording
        routers = tuple(r for r in recording.routers if self.takes_router(r))
        names = {router.name for router in routers}
        calls = recording.calls
        chosen = [key.name in names for key in calls.keys]
        times = zip(calls.router.tolist(), calls.step.tolist(), calls.stage.tolist(), strict=True)
        rows = [i for i, (r, *time) in enumerate(times) if chosen[r] and self.takes_time(*time)]
        return replace(recording, routers=routers, samples=calls.take(np.array(rows, np.int64)))

    def apply(self, recording: Recording) -> Recording:
        """The recording with the selected routers and calls.

        Raises:
            UsageError: nothing is left.
        """
        narrowed = self.narrow(recording)
        if self and not narrowed.samples:
            raise UsageError(
                f"no call is left after the filters; the trace has layers {_list(recording)}, steps "
                f"{_ranges(recording.calls.step.tolist())} and stages "
                f"{', '.join(sorted(set(recording.calls.stage.tolist()))) or 'none'}"
            )
        return narrowed


def _list(recording: Recording) -> str:
    sites = [router.site for router in recording.routers]
    return ", ".join(sites[:6]) + (f", … {sites[-1]}" if len(sites) > 6 else "")


def _ranges(steps: Iterable[int]) -> str:
    ordered = sorted(set(steps))
    if not ordered:
        return "none"
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
