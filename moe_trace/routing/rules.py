"""Ready-made routing rules for `replace_router`; each function is a factory that returns a rule.

Probabilities are softmax(router_logits). Shape suffixes: T tokens, E experts, K slots per token. No rule
synchronizes with the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_trace.data.errors import UsageError
from moe_trace.routing.replace import SKIP, RoutingRule, is_skipped


def top_k(k: int) -> RoutingRule:
    """Use exactly `k` experts per token, however many the router was trained to use.

    If `k` is at most the router's K, the slots of largest weight are kept and the others are not computed.
    Otherwise the most probable experts are used, with their probabilities scaled per token as the router
    scaled its own K: exact for routers that select by softmax, an approximation for the others.
    """
    if k < 1:
        raise UsageError(f"expected k >= 1, found {k}")

    def rule(logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        experts = logits_TE.shape[-1]
        if k > experts:
            raise UsageError(f"expected k <= {experts}, the number of experts, found {k}")
        if k <= index_TK.shape[-1]:
            weights, slots = weights_TK.topk(k, dim=-1)
            return weights, index_TK.gather(-1, slots)
        probs, index = logits_TE.float().softmax(-1).topk(k, dim=-1)
        chosen_T1 = _slot_probabilities(logits_TE, index_TK).sum(-1, keepdim=True)
        scale = weights_TK.float().sum(-1, keepdim=True) / chosen_T1.masked_fill(chosen_T1 == 0, 1.0)
        return probs * scale, index

    return rule


def confidence_threshold(p: float) -> RoutingRule:
    """Skip slots with a probability below `p`; the most probable slot of a token is always kept."""
    _require_share("p", p)

    def rule(logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        probs_TK = _slot_probabilities(logits_TE, index_TK)
        keep = (probs_TK >= p) | _is_largest(probs_TK)
        return weights_TK, index_TK.masked_fill(~keep, SKIP)

    return rule


def cumulative_mass(p: float) -> RoutingRule:
    """Use the most probable slots of each token until their probabilities sum to `p` (dynamic k).

    At least one slot, at most the router's K (top-p routing, arXiv:2403.07652, there without that cap).
    """
    _require_share("p", p)

    def rule(logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        probs_TK = _slot_probabilities(logits_TE, index_TK)
        ordered, slots = probs_TK.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        keep_ordered = mass_before < p
        keep_ordered[:, 0] = True
        keep = torch.zeros_like(keep_ordered).scatter(-1, slots, keep_ordered)
        return weights_TK, index_TK.masked_fill(~keep, SKIP)

    return rule


def drop_over_capacity(c: float) -> RoutingRule:
    """Limit each expert to ceil(c x T x K / E) tokens per call and skip later ones.

    `c` is the capacity factor (Switch Transformers, arXiv:2101.03961, equation 3; times K for top-k). First
    choices precede second choices (GShard, arXiv:2006.16668), each in the order of the tokens, padding
    included. A decode step with few tokens has little capacity: mind `generate()`.
    """
    if not c > 0:
        raise UsageError(f"expected a capacity factor c > 0, found {c}")

    def rule(logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        experts = logits_TE.shape[-1]
        capacity = math.ceil(c * index_TK.numel() / experts)
        # [K, T]: the queue of first choices, then that of second choices. Slots already skipped get a queue
        # of their own.
        queue = index_TK.masked_fill(is_skipped(index_TK, logits_TE), experts).T.flatten()
        place = _place_in_queue(queue, experts + 1).view(index_TK.shape[::-1]).T
        return weights_TK, index_TK.masked_fill(place >= capacity, SKIP)

    return rule


def _slot_probabilities(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Return the [T, K] float32 probability of each slot's expert, 0 for slots already skipped."""
    probs_TE, last = logits_TE.float().softmax(-1), logits_TE.shape[-1] - 1
    return probs_TE.gather(-1, index_TK.clamp(0, last)).masked_fill(is_skipped(index_TK, logits_TE), 0.0)


def _is_largest(probs_TK: Tensor) -> Tensor:
    """Return a mask that is True at the first of the largest slots of each token."""
    best = probs_TK.argmax(-1, keepdim=True)
    return torch.zeros_like(probs_TK, dtype=torch.bool).scatter(-1, best, True)


def _place_in_queue(ids_N: Tensor, bins: int) -> Tensor:
    """Return the number of equal ids before each id, shape [N]."""
    order = ids_N.argsort(stable=True)
    counts = torch.zeros(bins, dtype=torch.int64, device=ids_N.device)
    counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(ids_N), device=ids_N.device) - starts[ids_N[order]]
    return torch.empty_like(places).scatter_(0, order, places)


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"expected {name} within [0, 1], found {value}")
