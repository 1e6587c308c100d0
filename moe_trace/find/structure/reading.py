"""Reading of a router's assignments from the form of its output, or of the experts' arguments.

Experts that are modules in a list only receive rows. In that case the gate's top-k is used if it sends as
many rows to each expert as entered it, which is checked once the counts have been copied to the host
(`record/calls/settled_rows.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts.contract import AdapterMismatch, Call, ExpertRows, RouterOutput
from moe_trace.find.contracts.modules import described
from moe_trace.find.contracts.overhead_range import overhead_range
from moe_trace.find.structure.decision import MASK_ARGUMENT, read_index, read_masks, told_counts


def read_by_structure(
    call: Call,
    *,
    num_experts: int,
    top_k: int,
    names: tuple[str, ...] = (),
    is_gate: bool = False,
    gives_logits: bool = False,
) -> RouterOutput:
    """Read the assignments from the experts' arguments, or else from the router's output.

    Args:
        num_experts: E.
        top_k: K; 0 if only the call shows it.
        names: parameter names of the experts' forward, to find a token mask among the arguments.
        is_gate: whether the router is a linear layer, or ends with one.
        gives_logits: whether the router's output is its logits.

    Raises:
        AdapterMismatch: neither has a form that determines the assignments.
    """
    output = call.router_output
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    arguments = dict(zip(names, call.experts_args or (), strict=False)) | call.experts_kwargs
    decision = read_index(tuple(arguments.values())[1:], num_experts)
    if not is_gate:
        decision = (
            decision
            or read_index(parts, num_experts, one_each=top_k == 1)
            or read_masks(parts, num_experts, top_k)
        )
    logits = output if gives_logits else call.watched_output
    if decision is None:
        return _by_rows(call, parts, logits, num_experts, top_k)
    decision = decision.without(arguments.get(MASK_ARGUMENT), num_experts)
    rows = None if call.expert_rows is None else ExpertRows(call.expert_rows, by_logits=False, whole=False)
    counts_E, logits_TE = told_counts(parts, num_experts), _flat(logits, num_experts)
    return RouterOutput(decision.index_TK, decision.weights_TK, logits_TE, rows, counts_E)


def _flat(logits: Any, num_experts: int) -> Tensor | None:
    if not isinstance(logits, Tensor) or logits.shape[-1] != num_experts:
        return None
    return logits.reshape(-1, num_experts)


def _by_rows(call: Call, parts: tuple[Any, ...], logits: Any, num_experts: int, top_k: int) -> RouterOutput:
    """Return the top-k of a gate's scores, to be compared with the rows that entered each expert."""
    dense = [
        t for t in parts if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1:] == (num_experts,)
    ]
    rows_E = call.expert_rows
    if len(dense) != 1 or (rows_E is None and dense[0].numel()):
        listed = "" if rows_E is None else f", or one tensor [.., {num_experts}] of the gate's"
        raise AdapterMismatch(
            f"expected a router's output that tells one decision over {num_experts} experts - a whole-number "
            "tensor [.., K] with weights of its shape, a boolean map [T, E] with top-k known, or a mask "
            f"[T, E, C]{listed} - found {described(call.router_output)}"
            + ("" if rows_E else "; and no expert was called that is a module of a list")
        )
    scores_TE = dense[0].reshape(-1, num_experts)
    tokens, total_rows = scores_TE.shape[0], sum(rows_E or ())
    slots = top_k or -(-total_rows // max(1, tokens))
    if rows_E is not None and not _may_be_tokens(rows_E, tokens, top_k):
        limit = f"{top_k} rows" if top_k else "a whole number of rows"
        raise AdapterMismatch(
            f"expected the experts to receive at most {limit} for each of the {tokens} tokens of the gate, "
            f"found {list(rows_E)} rows. moe_trace.register_adapter teaches what they are"
        )
    with overhead_range():
        top_TK, index_TK = scores_TE.topk(min(slots, num_experts), dim=-1)
        expert_rows = ExpertRows(
            rows_E or (0,) * num_experts, by_logits=True, whole=total_rows == tokens * top_k
        )
        return RouterOutput(index_TK, torch.ones_like(top_TK), _flat(logits, num_experts), expert_rows)


def _may_be_tokens(rows_E: tuple[int, ...], tokens: int, top_k: int) -> bool:
    if max(rows_E) > tokens:
        return False
    return sum(rows_E) <= top_k * tokens if top_k else sum(rows_E) % max(1, tokens) == 0
