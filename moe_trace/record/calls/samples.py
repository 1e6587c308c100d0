"""Batches of reduced router calls, from the device to `RoutingSample`s."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.schema import RouterInfo, RoutingSample
from moe_trace.find.contracts import AdapterMismatch, ExpertRows
from moe_trace.record.calls.call import CallRecord, Records
from moe_trace.record.calls.settled_rows import k_histogram, settled_counts
from moe_trace.record.calls.sparse_rows import SparseRows, smallest
from moe_trace.record.parallel.dispatch import sent_counts
from moe_trace.record.reduce.stats import FLOAT_FIELDS

_RECORD_BYTES = 400  # of a `CallRecord` with its numbers; in a forward's columns a call takes 150


@dataclass(slots=True)
class Batch:
    """Calls reduced together; the metrics move from the device to pinned memory to numpy."""

    records: Records
    top_k: int
    tokens: int
    num_experts: int
    classes: int
    """Number of logits per token, which may exceed the number of experts; 0 without true logits."""
    ints: Any
    floats: Any
    in_phases: bool = False
    """Whether assignments are also counted by phase."""
    num_slots: int = 0
    """P, if assignments to each physical slot are also counted."""
    stream: int = 0
    memory_bytes: int | None = None
    """Memory allocated on the device when the calls were reduced."""
    copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Approximate host memory of the batch."""
        return int(self.ints.nbytes + self.floats.nbytes) + _RECORD_BYTES * len(self.records)

    def drop(self, count: int) -> None:
        """Remove the first `count` calls."""
        self.records.drop(count)
        self.ints, self.floats = self.ints[count:], self.floats[count:]

    def to_samples(self) -> list[RoutingSample | AdapterMismatch]:
        """Return one sample per call, or the reason why it is unknown. Waits for the copy."""
        self.to_numpy()
        ints_LX = self.ints.dense() if isinstance(self.ints, SparseRows) else self.ints.astype(np.int64)
        rows = zip(self.records, ints_LX, self.floats, strict=True)
        return [_sample(self, record, ints, floats) for record, ints, floats in rows]

    def to_numpy(self) -> None:
        """Move the metrics to the host, in as few bytes as hold them. Waits for the copy."""
        if isinstance(self.ints, Tensor):
            if self.copied is not None:
                self.copied.synchronize()
            self.ints = smallest(self.ints.cpu().numpy())
            self.floats = self.floats.float().cpu().numpy().copy()
            self.copied = None


def _sample(
    batch: Batch, record: CallRecord, ints: np.ndarray, sums: np.ndarray
) -> RoutingSample | AdapterMismatch:
    sample = _decided_sample(batch, record, ints, sums)
    try:
        return sample if record.rows is None else _with_settled_counts(record.rows, sample, record.site.info)
    except AdapterMismatch as mismatch:
        return mismatch


def _with_settled_counts(rows: ExpertRows, sample: RoutingSample, info: RouterInfo) -> RoutingSample:
    computed = sum(rows.rows_E)
    sample = replace(sample, computed_slots=computed, expert_flops=info.expert_flops_per_slot * computed)
    counts_E = settled_counts(rows, sample.assignments, sample.tokens)
    if counts_E is sample.assignments:
        return sample
    return replace(
        sample,
        assignments=counts_E,
        skipped=max(0, sample.tokens * sample.top_k - int(counts_E.sum())),
        k_histogram=k_histogram(counts_E, sample.tokens, sample.top_k),
        topk_mass=None,
        aux_loss=None,
        prefill_assignments=None,
        decode_assignments=None,
    )


def _decided_sample(batch: Batch, record: CallRecord, ints: np.ndarray, sums: np.ndarray) -> RoutingSample:
    experts, k = batch.num_experts, batch.top_k
    assignments = ints[:experts]
    zero_weight, out_of_range = int(ints[experts]), int(ints[experts + 1])
    tokens_K = ints[experts + 2 : experts + 3 + k]
    padding, finite = int(ints[experts + 3 + k]), int(ints[experts + 4 + k])
    info = record.site.info
    computed = _computed_slots(info, batch.tokens, assignments, zero_weight)
    means: dict[str, Any] = _means(sums, finite, batch.classes)
    return RoutingSample(
        site=info.site,
        name=info.name,
        layer=info.layer,
        call=record.call,
        step=record.step,
        phase=record.phase,
        stage=record.stage,
        tokens=batch.tokens,
        top_k=k,
        assignments=assignments,
        skipped=zero_weight + out_of_range,
        computed_slots=computed,
        padding_assignments=padding,
        nonfinite_tokens=batch.tokens - finite if batch.classes else 0,
        k_histogram=tokens_K,
        router_flops=info.router_flops_per_token * batch.tokens,
        expert_flops=info.expert_flops_per_slot * computed,
        memory_allocated_bytes=batch.memory_bytes,
        host_start_ns=record.start_ns,
        host_end_ns=record.end_ns,
        thread=record.thread,
        profiled=record.profiled,
        aux_loss=_aux_loss(batch, sums, finite),
        in_graph=record.in_graph,
        graph_forward=record.graph_forward,
        dispatched=sent_counts(ints[: len(ints) - 2 * batch.num_slots], record.sending, experts),
        slot_bytes=None if record.sending is None else record.sending.slot_bytes,
        **(means | _reported(batch, record, ints) | _slots(batch, ints)),
    )


def _reported(batch: Batch, record: CallRecord, ints: np.ndarray) -> dict[str, Any]:
    """Return what a host framework reports of the tokens, and the metrics that follow from it."""
    tokens = record.batch
    if tokens is None or not batch.in_phases or len(tokens) != batch.tokens:
        return {}
    start, (requests, in_prefill) = batch.num_experts + batch.top_k + 5, tokens.counted_requests()
    by_phase = ints[start : start + 2 * batch.num_experts]
    return {
        "prefill_tokens": tokens.prefill_tokens,
        "decode_tokens": tokens.decode_tokens,
        "prefill_assignments": by_phase[: batch.num_experts],
        "decode_assignments": by_phase[batch.num_experts :],
        "requests": requests,
        "prefill_requests": in_prefill,
    }


def _slots(batch: Batch, ints: np.ndarray) -> dict[str, Any]:
    """Return assignments and expert of each physical slot; nothing if no slot's expert is known."""
    if not batch.num_slots:
        return {}
    counts_P, experts_P = ints[len(ints) - 2 * batch.num_slots :].reshape(2, -1)
    if not (experts_P >= 0).any():
        return {}
    return {"slot_assignments": counts_P, "slot_experts": experts_P}


def _aux_loss(batch: Batch, sums: np.ndarray, finite: int) -> float | None:
    """Return the load balancing loss of one call: E x sum of (slots / T) x (mean probability)."""
    if batch.classes != batch.num_experts or finite == 0:
        return None
    return batch.num_experts * float(sums[FLOAT_FIELDS.index("load_x_prob")]) / (batch.tokens * finite)


def _computed_slots(info: RouterInfo, tokens: int, assignments: np.ndarray, zero_weight: int) -> int:
    """Return how many rows experts multiplied, including those of weight 0 but not of identity experts."""
    if info.every_expert_computes:
        return tokens * info.num_experts
    return int(assignments[: len(assignments) - info.identity_experts].sum()) + zero_weight


_MEANS = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss")


def _means(sums: np.ndarray, finite: int, classes: int) -> dict[str, float | None]:
    """Return means over the tokens with finite logits; None if there are none."""
    if not classes or not finite:
        return dict.fromkeys(_MEANS)
    mean = {name: float(value) / finite for name, value in zip(FLOAT_FIELDS, sums, strict=True)}
    mean["router_entropy"] = max(0.0, mean["entropy"])
    # With one expert the router cannot be uncertain.
    mean["confidence"] = 1.0 - mean["router_entropy"] / math.log(classes) if classes > 1 else 1.0
    return {name: mean[name] for name in _MEANS}
