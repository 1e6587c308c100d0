"""Which calls a question is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Recording, RouterInfo, RoutingSample, Stage


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

    def takes_sample(self, sample: RoutingSample) -> bool:
        """Whether the call is of a selected step and stage."""
        return self.takes_time(sample.step, sample.stage)

    def takes_time(self, step: int, stage: Stage) -> bool:
        """Whether the filter selects that stage of that step."""
        return (not self.steps or step in self.steps) and (not self.stages or stage in self.stages)

    def narrow(self, recording: Recording) -> Recording:
        """The recording with the selected routers and calls, of which there may be none."""
        if not self:
            return recording
        routers = tuple(r for r in recording.routers if self.takes_router(r))
        names = {router.name for router in routers}
        samples = tuple(s for s in recording.samples if s.name in names and self.takes_sample(s))
        return replace(recording, routers=routers, samples=samples)

    def apply(self, recording: Recording) -> Recording:
        """The recording with the selected routers and calls.

        Raises:
            UsageError: nothing is left.
        """
        narrowed = self.narrow(recording)
        if self and not narrowed.samples:
            raise UsageError(
                f"no call is left after the filters; the trace has layers {_list(recording)}, steps "
                f"{_ranges(s.step for s in recording.samples)} and stages "
                f"{', '.join(sorted({s.stage for s in recording.samples})) or 'none'}"
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
