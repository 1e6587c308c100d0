"""What an uneven load costs: expert time at the load that was measured against time at equal load.

From the trace's own calls of a layer, by least squares: time = a + b·slots + c·excess, where excess is the
busiest expert's slots over the mean expert's. At equal load the excess is 0, so c·mean(excess) is the cost.
Where the loads hardly vary, or there are too few calls, the fit would be a guess: then the answer is that
it cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_trace.data.schema import RouterInfo
from moe_trace.read.time.phases import CallTimes
from moe_trace.read.time.structure import EXPERTS

CALLS_MIN = 8
_UNKNOWN = "the device's times are not known"
LEVER_MIN = 0.25
"""Least range of the excess over its mean: the fit reaches from there to 0."""

# Two-sided 97.5 % points of Student's t by degrees of freedom; beyond the table the next lower entry holds.
_T_975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 1000: 1.962,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImbalanceCost:
    """One layer's answer, in microseconds per call; the interval is of 95 %."""

    site: str
    name: str
    verdict: Literal["costs", "no effect seen", "cannot tell"]
    reason: str
    """Why it cannot be told; empty otherwise."""
    calls: int
    measured_us: float | None
    equal_load_us: float | None
    cost_us: float | None
    low_us: float | None
    high_us: float | None


def imbalance_costs(times: CallTimes, routers: Sequence[RouterInfo]) -> tuple[ImbalanceCost, ...]:
    """One answer a layer that has calls in the trace."""
    work_ns = times.work_ns(times.forward)
    found = []
    for router in routers:
        rows = np.flatnonzero(times.samples.of_router(router.name))
        if len(rows):
            loads = times.samples.assignments.take(rows)
            slots = loads.totals().astype(np.float64)
            excess = loads.largest() - slots / np.maximum(1, loads.sizes)
            if work_ns is None:
                found.append(_answer(router, "cannot tell", _UNKNOWN, np.zeros(0), len(rows)))
            else:
                found.append(_cost(router, work_ns[rows, EXPERTS] / 1000, slots, excess))
    return tuple(found)


def _cost(router: RouterInfo, time_us: np.ndarray, slots: np.ndarray, excess: np.ndarray) -> ImbalanceCost:
    calls, reason = len(time_us), _cannot_tell(slots, excess)
    fit = None if reason else _fit(time_us, slots, excess)
    if fit is None:
        reason = reason or "the load grows with the number of tokens alone"
        return _answer(router, "cannot tell", reason, time_us, calls)
    slope, error = fit
    cost = slope * excess.mean()
    reach = error * excess.mean()
    if cost - reach <= 0 <= cost + reach:
        return _answer(router, "no effect seen", "", time_us, calls, cost, reach)
    if cost < 0:
        return _answer(
            router,
            "cannot tell",
            "calls with a more even load took longer: something else varies",
            time_us,
            calls,
        )
    return _answer(router, "costs", "", time_us, calls, cost, reach)


def _cannot_tell(slots: np.ndarray, excess: np.ndarray) -> str:
    if len(slots) < CALLS_MIN:
        return f"{len(slots)} calls; a fit needs {CALLS_MIN}"
    mean = excess.mean()
    if mean <= 0:
        return "the load was equal in every call"
    if np.ptp(excess) < LEVER_MIN * mean:
        return (
            f"the loads vary by {100 * np.ptp(excess) / mean:.0f} % only; a fit needs {100 * LEVER_MIN:.0f} %"
        )
    return ""


def _fit(time_us: np.ndarray, slots: np.ndarray, excess: np.ndarray) -> tuple[float, float] | None:
    """Slope on the excess and half its 95 % interval; None where it cannot be told from the slots."""
    columns = [np.ones_like(slots), excess / excess.max()]
    if np.ptp(slots) > 0:
        columns.append(slots / slots.max())
    design = np.stack(columns, axis=1)
    freedom = len(time_us) - design.shape[1]
    if freedom < 1 or np.linalg.cond(design) > 1e3:
        return None
    solution, *_ = np.linalg.lstsq(design, time_us, rcond=None)
    residual = time_us - design @ solution
    covariance = np.linalg.inv(design.T @ design) * (residual @ residual) / freedom
    t = _T_975[max(n for n in _T_975 if n <= freedom)]
    scale = excess.max()
    return float(solution[1] / scale), float(t * np.sqrt(covariance[1, 1]) / scale)


def _answer(
    router: RouterInfo,
    verdict: Literal["costs", "no effect seen", "cannot tell"],
    reason: str,
    time_us: np.ndarray,
    calls: int,
    cost: float | None = None,
    reach: float | None = None,
) -> ImbalanceCost:
    measured = float(time_us.mean()) if len(time_us) else None
    known = cost is not None and reach is not None and measured is not None
    return ImbalanceCost(
        site=router.site,
        name=router.name,
        verdict=verdict,
        reason=reason,
        calls=calls,
        measured_us=measured,
        equal_load_us=measured - cost if known else None,  # type: ignore[operator]
        cost_us=float(cost) if known else None,  # type: ignore[arg-type]
        low_us=float(cost - reach) if known else None,  # type: ignore[operator]
        high_us=float(cost + reach) if known else None,  # type: ignore[operator]
    )
