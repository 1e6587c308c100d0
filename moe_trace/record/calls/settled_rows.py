"""Compare a decision with the rows that entered its experts, once its counts are on the host.

A decision recomputed from a gate's logits is the model's own if its counts equal the numbers of rows. If they
differ (a bias, groups, noise, a capacity), the rows are the truth where they can be rows of tokens, and it is
unknown which token each of them was.
"""

from __future__ import annotations

import numpy as np

from moe_trace.find.contracts import AdapterMismatch, ExpertRows


def settled_counts(rows: ExpertRows, decided_E: np.ndarray, tokens: int) -> np.ndarray:
    """Return the [E] numbers of tokens that the experts processed.

    Args:
        decided_E: slots of the decision as read.

    Raises:
        AdapterMismatch: the decision is not the gate's top-k, and the rows may not be tokens.
    """
    rows_E = np.asarray(rows.rows_E)
    if np.array_equal(rows_E, decided_E):
        return decided_E
    uniform = bool((rows_E == rows_E[0]).all())
    if not rows.by_logits:
        moved = rows_E.sum() == decided_E.sum() and not uniform
        # Fewer rows: dropped by a capacity. More: padding, or experts whose results are masked afterwards.
        # No rows: the expert was not called as a module, but computed elsewhere.
        return rows_E if moved else np.where(rows_E > 0, np.minimum(rows_E, decided_E), decided_E)
    all_tokens = tokens > 1 and bool((rows_E[rows_E > 0] == tokens).all())
    if uniform or (all_tokens and not rows.whole):
        raise AdapterMismatch(
            f"expected experts to receive the tokens that the gate chose, found {rows_E.tolist()} rows of "
            f"{tokens} tokens where the top-k of its logits is {decided_E.tolist()}: padded to a capacity, "
            "masked after the experts, or chosen by them. moe_trace.register_adapter teaches how it decides"
        )
    return rows_E


def k_histogram(counts_E: np.ndarray, tokens: int, top_k: int) -> np.ndarray:
    """Return [K + 1] tokens by number of slots used if the counts determine it, else zeros for unknown."""
    histogram, slots = np.zeros(top_k + 1, dtype=np.int64), int(counts_E.sum())
    if slots == tokens * top_k:
        histogram[top_k] = tokens
    elif top_k == 1:
        histogram[:] = tokens - slots, slots
    return histogram


def disagreement(told_E: np.ndarray, counts_E: np.ndarray, skipped: int) -> str | None:
    """Return how a router's own tokens per expert differ from its decision; None if they do not.

    Counts taken before tokens are dropped (DeepSpeed's `exp_counts`) agree if they exceed the decision by the
    skipped slots.
    """
    reported = np.rint(told_E).astype(np.int64)
    if not np.array_equal(reported, told_E):  # a share or a bias
        return None
    before_drops = bool((reported >= counts_E).all()) and int(reported.sum()) == int(counts_E.sum()) + skipped
    if before_drops or np.array_equal(reported, counts_E):
        return None
    return f"{reported.tolist()} tokens per expert where its ids give {counts_E.tolist()}"
