"""Cost of an uneven load where experts are spread over ranks: the extra time of the busiest rank.

The time of a rank's experts depends on the slots that they compute, so each call is fitted across its ranks
(step, tokens and layer cancel) and checked on held-out calls (`read.time.fit`). The cost of a call is the
fitted time of the busiest rank's slots beyond the mean rank's, for which the others wait, all else equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_trace.read.ranks.collective_costs import SampleIndex
from moe_trace.read.ranks.inputs import Ranks
from moe_trace.read.ranks.loads import CallLoad
from moe_trace.read.time.fit import Array, Calls, Fit, fit_load, half_interval
from moe_trace.read.time.imbalance import (
    R2_MIN,
    WIDE,
    Imbalance,
    ImbalanceCost,
    LoadModel,
    Verdict,
    reason_of,
    wide_reason,
)
from moe_trace.read.time.phase_detection import EXPERTS
from moe_trace.read.time.phases import CallTimes

SLOTS = "slots of the rank"


def rank_imbalance(ranks: Ranks, times: Mapping[int, CallTimes]) -> Imbalance:
    """Estimate the cost per layer, from calls that all ranks made and whose times are known.

    Args:
        times: Times of the calls by rank.
    """
    time_CR = _times(ranks.loads, times, ranks.index)
    known = np.flatnonzero(~np.isnan(time_CR).any(axis=1))
    loads, time_CR = [ranks.loads[i] for i in known.tolist()], time_CR[known]
    if not len(loads):
        return Imbalance((), ())
    slots_CR = np.array([load.load_R for load in loads], np.float64)
    fit, reason = _fit(time_CR, slots_CR)
    names = list(dict.fromkeys(load.key[0] for load in loads))
    costs = []
    for name in names:
        of_router = np.array([load.key[0] == name for load in loads])
        site = next(load.site for load in loads if load.key[0] == name)
        costs.append(_cost(site, name, time_CR[of_router], slots_CR[of_router], fit, reason))
    verdicts = {cost.verdict for cost in costs}
    model = LoadModel(
        sites=tuple(cost.site for cost in costs),
        verdict=next(v for v in ("costs", "no effect seen", "cannot tell") if v in verdicts),
        reason=reason or next((cost.reason for cost in costs if cost.reason), ""),
        calls=time_CR.size,
        comparison="ranks" if fit is not None else None,
        us_per_unit={SLOTS: float(fit.slopes[0])} if fit is not None else {},
        held_out_r2=fit.held_out_r2 if fit is not None else None,
    )
    return Imbalance((model,), tuple(costs))


def _times(
    loads: Sequence[CallLoad], times: Mapping[int, CallTimes], index: Mapping[int, SampleIndex]
) -> Array:
    """Return the time of the experts in microseconds, [calls, ranks], or NaN if unknown."""
    row = {load.key: i for i, load in enumerate(loads)}
    found = np.full((len(loads), len(times)), np.nan)
    for column, rank in enumerate(sorted(times)):
        work_ns = times[rank].work_ns(times[rank].forward)
        if work_ns is None:
            continue
        for i, call in enumerate(times[rank].samples.call_keys()):
            known = index[rank].get(call)
            if known is not None and known[0] in row:
                found[row[known[0]], column] = work_ns[i, EXPERTS] / 1000
    return found


def _fit(time_CR: Array, slots_CR: Array) -> tuple[Fit | None, str]:
    calls, ranks = time_CR.shape
    data = Calls(
        time_us=time_CR.ravel(),
        slots=slots_CR.ravel(),
        forward=np.repeat(np.arange(calls), ranks),
        layer=np.tile(np.arange(ranks), calls),
        figures={SLOTS: slots_CR.ravel()},
    )
    if not np.ptp(slots_CR, axis=1).any():
        return None, "the ranks compute equally many slots in every call"
    fit = fit_load(data, with_trend=False)
    if fit is None:
        return None, "the ranks' loads hardly vary from call to call: record more steps, of several texts"
    return fit, reason_of(fit, data)


def _cost(
    site: str, name: str, time_CR: Array, slots_CR: Array, fit: Fit | None, reason: str
) -> ImbalanceCost:
    busiest = slots_CR.argmax(axis=1)
    measured = float(time_CR[np.arange(len(busiest)), busiest].mean())
    answer = ImbalanceCost(
        site=site,
        name=name,
        verdict="cannot tell",
        reason=reason,
        calls=len(time_CR),
        measured_us=measured,
        equal_load_us=None,
        cost_us=None,
        low_us=None,
        high_us=None,
    )
    if fit is None or reason:
        return answer
    excess = np.array([(slots_CR.max(axis=1) - slots_CR.mean(axis=1)).mean()])
    cost, reach = float(excess @ fit.slopes), half_interval(fit, excess)
    if reach > WIDE * measured:
        return replace(answer, reason=wide_reason(reach / measured))
    sure = fit.held_out_r2 >= R2_MIN and cost - reach > 0
    verdict: Verdict = "costs" if sure else "no effect seen"
    return replace(
        answer,
        verdict=verdict,
        equal_load_us=measured - cost,
        cost_us=cost,
        low_us=cost - reach,
        high_us=cost + reach,
    )
