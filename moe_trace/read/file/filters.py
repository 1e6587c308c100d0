"""Selection of the calls to analyse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from moe_trace.data.calls.stages import of_stages, stages_of, whole_stages
from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Recording, RouterInfo, Stage


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A selection of layers, steps and stages. Empty sets select everything."""

    layers: frozenset[str] = frozenset()
    """Layer indices (as strings), labels or module paths."""
    steps: frozenset[int] = frozenset()
    stages: frozenset[Stage] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.layers or self.steps or self.stages)

    def takes_router(self, router: RouterInfo) -> bool:
        """Return whether the router is selected."""
        return not self.layers or bool({str(router.layer), router.site, router.name} & self.layers)

    def takes_time(self, step: int, stage: Stage) -> bool:
        """Return whether calls of this stage in this step are selected as a whole, with their time."""
        selected = not self.stages or stage in whole_stages(self.stages)
        return selected and (not self.steps or step in self.steps)

    def of_whole_forwards(self) -> Filter:
        """Return a filter that selects whole mixed forwards instead of a part, where decoding is selected."""
        return replace(self, stages=self.stages | {"mixed"}) if "decode" in self.stages else self

    def narrow(self, recording: Recording) -> Recording:
        """Return the recording with the selected routers and calls, which may be empty.

        Of mixed calls it contains the part of the selected stage (see `of_stages`).
        """
        if not self:
            return recording
        routers = tuple(r for r in recording.routers if self.takes_router(r))
        names = {router.name for router in routers}
        calls = recording.calls
        rows = np.isin(calls.router, [i for i, key in enumerate(calls.keys) if key.name in names])
        if self.steps:
            rows &= np.isin(calls.step, list(self.steps))
        chosen = calls.take(rows)
        return replace(
            recording, routers=routers, samples=of_stages(chosen, self.stages) if self.stages else chosen
        )

    def apply(self, recording: Recording) -> Recording:
        """Return the recording with the selected routers and calls.

        Raises:
            UsageError: Nothing is left.
        """
        narrowed = self.narrow(recording)
        if self and not narrowed.samples:
            raise UsageError(
                f"no call is left after the filters; the trace has layers {_list(recording)}, steps "
                f"{_ranges(recording.calls.step.tolist())} and stages "
                f"{', '.join(sorted(stages_of(recording.calls))) or 'none'}"
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
