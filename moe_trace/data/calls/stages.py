"""Selection of calls by stage, including the part of a mixed call that belongs to one stage."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.ragged import CountLists
from moe_trace.data.calls.sample import STAGES, Stage
from moe_trace.data.calls.table import NONE, CallTable

_SPLIT: tuple[Stage, ...] = ("prefill", "decode")
_WHOLE_CALL_METRICS = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss", "aux_loss")
"""Means over all tokens of a call, which are unknown for its parts."""


def stages_of(calls: CallTable) -> list[Stage]:
    """Return the stages of calls, or of parts of mixed calls, in the order of `STAGES`."""
    found = set(calls.stage.tolist())
    return [stage for stage in STAGES if stage in found or _has_part(calls, stage).any()]


def whole_stages(stages: Collection[Stage]) -> Collection[Stage]:
    """Return the stages whose whole calls are selected: `mixed` too if both prefill and decode are."""
    return {*stages, "mixed"} if set(_SPLIT) <= set(stages) else stages


def of_stages(calls: CallTable, stages: Collection[Stage]) -> CallTable:
    """Return the calls of some stages, with mixed calls reduced to their part, under the same number.

    A part has the tokens, assignments, requests and FLOPs of its stage, without padding. Its time and its
    means over tokens cannot be separated from those of the whole call, so both are unknown.
    """
    whole = whole_stages(stages)
    rows = np.isin(calls.stage, list(whole))
    stage = next((stage for stage in _SPLIT if stage in stages), None)
    if stage is None or "mixed" in whole:
        return calls.take(rows)
    part = _has_part(calls, stage)
    index = np.flatnonzero(rows | part)
    found = calls.take(index)
    return _as_parts(found, part[index], stage) if part.any() else found


def requests_per_forward(calls: CallTable) -> float | None:
    """Return the mean number of requests in the forward calls; None if unknown."""
    known = calls.requests[calls.forward & (calls.requests != NONE)]
    return float(known.mean()) if len(known) else None


def _has_part(calls: CallTable, stage: Stage) -> npt.NDArray[np.bool_]:
    """Return whether each call is mixed and has tokens of the stage, [N]."""
    if stage not in _SPLIT:
        return np.zeros(len(calls), bool)
    known = calls.lists[f"{stage}_assignments"].known
    found: npt.NDArray[np.bool_] = (calls.stage == "mixed") & known & (calls.numbers[f"{stage}_tokens"] > 0)
    return found


def _as_parts(calls: CallTable, part: npt.NDArray[np.bool_], stage: Stage) -> CallTable:
    lists, numbers = dict(calls.lists), dict(calls.numbers)
    of_stage, other = lists[f"{stage}_assignments"], _SPLIT[1 - _SPLIT.index(stage)]
    tokens, slots = numbers[f"{stage}_tokens"], of_stage.totals()
    in_prefill = numbers["prefill_requests"]
    known = in_prefill != NONE
    # Exact if every assigned slot was computed.
    computed = numbers["computed_slots"] * slots // np.maximum(1, lists["assignments"].totals())
    requests = in_prefill if stage == "prefill" else np.where(known, numbers["requests"] - in_prefill, NONE)
    changed = {
        "stage": np.full(len(calls), stage),
        "tokens": tokens,
        "skipped": np.maximum(0, tokens * numbers["top_k"] - slots),
        "computed_slots": computed,
        "padding_assignments": np.zeros(len(calls), np.int64),
        "nonfinite_tokens": np.zeros(len(calls), np.int64),
        "router_flops": numbers["router_flops"] // np.maximum(1, numbers["tokens"]) * tokens,
        "expert_flops": numbers["expert_flops"] // np.maximum(1, numbers["computed_slots"]) * computed,
        "host_end_ns": numbers["host_start_ns"],
        f"{other}_tokens": np.zeros(len(calls), np.int64),
        "requests": requests,
        "prefill_requests": np.where(known, requests if stage == "prefill" else 0, NONE),
        **{name: np.full(len(calls), np.nan) for name in _WHOLE_CALL_METRICS},
    }
    for name, values in changed.items():
        numbers[name] = np.where(part, values, numbers[name])
    empty, unknown = np.zeros(0, np.int64), None
    lists["assignments"] = _chosen(part, of_stage, lists["assignments"])
    lists[f"{other}_assignments"] = _fill_rows(part, lists[f"{other}_assignments"], empty)
    lists["k_histogram"] = _fill_rows(part, lists["k_histogram"], empty)
    for name in ("dispatched", "slot_assignments", "slot_experts"):
        lists[name] = _fill_rows(part, lists[name], unknown)
    return CallTable(calls.keys, calls.router, numbers, lists, calls.places.without(part))


def _chosen(part: npt.NDArray[np.bool_], of_part: CountLists, whole: CountLists) -> CountLists:
    """Return `of_part` where the call is a part, else `whole`."""
    return CountLists.concatenated([of_part, whole]).take(np.where(part, 0, len(part)) + np.arange(len(part)))


def _fill_rows(
    part: npt.NDArray[np.bool_], whole: CountLists, value: npt.NDArray[np.int64] | None
) -> CountLists:
    return _chosen(part, CountLists.of([value] * len(part)), whole)
