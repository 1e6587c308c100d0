"""Cost of an uneven load: the experts' time compared with that of the most even load in the trace.

On one device, the time of a call's experts depends on reading their weights from memory, which grows with the
number of *active experts*, and on their products, which grow with the *busiest expert* if they run group by
group. An uneven load has fewer active experts and a busier busiest one, so it may cost or save time: the
effect is fitted on the trace's calls and checked on held-out ones (`fit`). The cost is the fitted difference
to the most even load in the trace with as many slots, so nothing is extrapolated. It is unknown where the
loads hardly vary, or explain little of the time of unseen calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moe_trace.data.schema import RouterInfo
from moe_trace.read.time.fit import CALLS_MIN, Array, Calls, Comparison, Fit, fit_load, half_interval
from moe_trace.read.time.phase_detection import EXPERTS
from moe_trace.read.time.phases import CallTimes

Verdict = Literal["costs", "saves", "no effect seen", "cannot tell"]
R2_MIN = 0.3
"""Minimum share of the variation in time of held-out calls that the load must explain."""
VARY_MIN = 0.05
"""Minimum range of a load metric per slot, relative to its mean."""
WIDE = 0.25
"""Maximum half width of a conclusive interval, relative to the time."""

_UNKNOWN = "the device's times are not known"
ACTIVE, BUSIEST = "active experts", "slots of the busiest expert"


@dataclass(frozen=True, kw_only=True)
class ImbalanceCost:
    """Cost for one layer in microseconds per forward call, with a 95 % interval; negative if the uneven load
    saves time."""

    site: str
    name: str
    verdict: Verdict
    reason: str
    """Why the cost is unknown, and what to record; otherwise empty."""
    calls: int
    measured_us: float | None
    equal_load_us: float | None
    """Expected time at the most even load in the trace with as many slots."""
    cost_us: float | None
    low_us: float | None
    high_us: float | None


@dataclass(frozen=True, kw_only=True)
class LoadModel:
    """Model of the experts' time as a function of the load, for layers that are alike."""

    sites: tuple[str, ...]
    verdict: Verdict
    reason: str
    calls: int
    comparison: Comparison | None
    """Comparison that was fitted (`fit`), or None if nothing was."""
    us_per_unit: dict[str, float]
    """Microseconds per unit of each load metric."""
    held_out_r2: float | None
    """Share of the variation in time of unseen calls that the fit predicts."""


def slopes_in_words(model: LoadModel) -> str:
    """Format slopes, as `4.8 µs for each of the active experts`; `us_per_unit` calls assignments `slots`."""
    return " and ".join(
        f"{us:.3g} µs for each of the {name.replace('slots', 'assignments')}"
        for name, us in model.us_per_unit.items()
    )


def saved_by(models: Sequence[LoadModel]) -> str:
    """Explain why an uneven load saves time on this device, or return an empty string if it does not."""
    model = next((model for model in models if model.verdict == "saves"), None)
    if model is None:
        return ""
    cause = "an uneven load has fewer of them, whose weights are read"
    if BUSIEST in model.us_per_unit:
        cause = "what fewer active experts save is more than what the busiest one adds"
    return f"the experts take {slopes_in_words(model)}, and {cause}."


@dataclass(frozen=True, eq=False)
class Imbalance:
    """Costs of all layers, with the models they are based on."""

    models: tuple[LoadModel, ...]
    layers: tuple[ImbalanceCost, ...]


def imbalance_costs(
    times: CallTimes, routers: Sequence[RouterInfo], *, experts_are_split: bool = False
) -> Imbalance:
    """Estimate the cost for each layer with forward calls in the trace.

    Args:
        experts_are_split: See `Recording.experts_are_split`; the time of a rank's experts then does not
            correspond to its routers' loads.
    """
    alike: dict[tuple[int, ...], list[RouterInfo]] = {}
    for router in routers:
        shape = (router.num_experts, router.top_k, router.expert_flops_per_slot)
        alike.setdefault(shape, []).append(router)
    models: list[LoadModel] = []
    layers: dict[str, ImbalanceCost] = {}
    for group in alike.values():
        rows = _Rows.of(times, group)
        if len(rows.calls.time_us):
            model, costs = rows.answer(experts_are_split)
            models.append(model)
            layers |= {cost.name: cost for cost in costs}
    return Imbalance(tuple(models), tuple(layers[r.name] for r in routers if r.name in layers))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Forward calls of layers that are alike."""

    routers: tuple[RouterInfo, ...]
    calls: Calls
    even: dict[str, Array]
    """[N] metrics of the most even load with as many slots."""

    @classmethod
    def of(cls, times: CallTimes, routers: Sequence[RouterInfo]) -> _Rows:
        number = {router.name: i for i, router in enumerate(routers)}
        of_key = np.array([number.get(key.name, -1) for key in times.samples.keys], np.int64)
        rows = np.flatnonzero(times.samples.forward & (of_key[times.samples.router] >= 0))
        table = times.samples.take(rows)
        loads = table.assignments
        slots = loads.totals().astype(np.float64)
        figures = {
            ACTIVE: loads.used().astype(np.float64),
            BUSIEST: loads.largest().astype(np.float64),
        }
        _, forward = np.unique(table.call, return_inverse=True)
        work_ns = times.work_ns(times.forward)
        calls = Calls(
            time_us=work_ns[rows, EXPERTS] / 1000 if work_ns is not None else np.full(len(rows), np.nan),
            slots=slots,
            forward=forward.astype(np.int64),
            layer=of_key[table.router],
            figures=figures,
        )
        most_even = _most_even(slots, np.array([0.0 if row is None else row.std() for row in loads.rows()]))
        return cls(tuple(routers), calls, {name: values[most_even] for name, values in figures.items()})

    def answer(self, experts_are_split: bool) -> tuple[LoadModel, list[ImbalanceCost]]:
        unknown = bool(np.isnan(self.calls.time_us).any())
        reason = _UNKNOWN if unknown else _SPLIT if experts_are_split else self._why_no_fit()
        fit = None if reason else fit_load(self.calls)
        reason = reason or reason_of(fit, self.calls)
        if fit is not None and not reason:
            reason = self._wide_interval_reason(fit)
        used = fit if fit is not None and not reason else None
        costs = [self._layer(i, used, reason) for i in sorted(set(self.calls.layer.tolist()))]
        verdicts = {cost.verdict for cost in costs}
        model = LoadModel(
            sites=tuple(cost.site for cost in costs),
            verdict=next(v for v in ("costs", "saves", "no effect seen", "cannot tell") if v in verdicts),
            reason=reason,
            calls=len(self.calls.time_us),
            comparison=fit.comparison if fit is not None else None,
            us_per_unit=dict(zip(fit.figures, fit.slopes.tolist(), strict=True)) if fit is not None else {},
            held_out_r2=fit.held_out_r2 if fit is not None else None,
        )
        return model, costs

    def _why_no_fit(self) -> str:
        calls, forwards = self.calls, len(set(self.calls.forward.tolist()))
        layers = len(set(calls.layer.tolist()))
        if forwards < CALLS_MIN and (layers < 2 or (layers - 1) * forwards < CALLS_MIN):
            return f"{forwards} forward calls a layer; a fit needs {CALLS_MIN}: record more steps"
        experts = self.routers[0].num_experts
        if not (calls.figures[BUSIEST] * experts - calls.slots).any():
            return "the load was equal in every call: record text of several kinds"
        relative = [values / np.maximum(1, calls.slots) for values in calls.figures.values()]
        vary = max(float(np.ptp(values) / values.mean()) for values in relative)
        if vary >= VARY_MIN:
            return ""
        if np.ptp(calls.slots) > 0:
            return _TOKENS_ALONE
        return f"the loads vary by {100 * vary:.0f} % only: record more tokens a step, of several texts"

    def _wide_interval_reason(self, fit: Fit) -> str:
        layers = sorted(set(self.calls.layer.tolist()))
        part = max(half_interval(fit, self._difference(fit, i)) for i in layers) / self.calls.time_us.mean()
        return wide_reason(part) if part > WIDE else ""

    def _difference(self, fit: Fit, layer: int) -> Array:
        """Return the mean of load - most even load over the layer's calls, [figures]."""
        in_layer = self.calls.layer == layer
        return np.array([(self.calls.figures[f] - self.even[f])[in_layer].mean() for f in fit.figures])

    def _layer(self, layer: int, fit: Fit | None, reason: str) -> ImbalanceCost:
        router, in_layer = self.routers[layer], self.calls.layer == layer
        measured = float(self.calls.time_us[in_layer].mean())
        unknown = ImbalanceCost(
            site=router.site,
            name=router.name,
            verdict="cannot tell",
            reason=reason,
            calls=int(in_layer.sum()),
            measured_us=measured if math.isfinite(measured) else None,
            **dict.fromkeys(("equal_load_us", "cost_us", "low_us", "high_us")),
        )
        if fit is None:
            return unknown
        difference = self._difference(fit, layer)
        cost, reach = float(difference @ fit.slopes), half_interval(fit, difference)
        sure = fit.held_out_r2 >= R2_MIN and not cost - reach <= 0 <= cost + reach
        return replace(
            unknown,
            verdict="no effect seen" if not sure else "costs" if cost > 0 else "saves",
            reason=reason if difference.any() else "it has the most even load of the trace",
            equal_load_us=measured - cost,
            cost_us=cost,
            low_us=cost - reach,
            high_us=cost + reach,
        )


_SPLIT = (
    "the experts are spread over ranks, each of which computes other slots than its routers assigned; give "
    "the traces of all ranks"
)
_TOKENS_ALONE = "the load grows with the number of tokens alone: record steps of one size"


def _most_even(slots: Array, spread: Array) -> np.ndarray:
    """Return for each call the row of the most even call with as many slots."""
    most_even = np.arange(len(slots))
    for number in sorted(set(slots.tolist())):
        rows = np.flatnonzero(slots == number)
        most_even[rows] = rows[np.argmin(spread[rows])]
    return most_even


def wide_reason(part: float) -> str:
    """Explain that half the interval, as a share of the time, is too wide."""
    return f"the interval is ±{100 * part:.0f} % of the experts' time: record more steps"


def reason_of(fit: Fit | None, calls: Calls) -> str:
    """Return why the fit is inconclusive, or an empty string."""
    if fit is None:
        if np.ptp(calls.slots) > 0:
            return _TOKENS_ALONE
        return "the load varies only together with the step: record steps in another order"
    reach = np.array([half_interval(fit, unit) for unit in np.eye(len(fit.slopes))])
    sure = np.abs(fit.slopes) > reach
    if not sure.any():
        return ""
    if (sure & (fit.slopes < 0)).any():
        name = fit.figures[int(np.argmax(sure & (fit.slopes < 0)))]
        return f"calls with more {name} took less time: something else varies; record one kind of step"
    if fit.held_out_r2 < R2_MIN:
        return (
            f"the load explains {100 * max(0.0, fit.held_out_r2):.0f} % of the variation in time of held-out "
            f"calls, and a cost needs {100 * R2_MIN:.0f} %: record more steps"
        )
    return ""
