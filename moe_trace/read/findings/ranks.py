"""Findings about a run of several ranks; all silent for a single one."""

from __future__ import annotations

from collections.abc import Iterator

from moe_trace.read.findings.finding import Evidence, Finding

HOT_RANK = 1.25
ENOUGH_PER_RANK = 20
WAIT_SHARE = 0.05
BYTES_DIFFERENT = 0.0
EARLY_RECEIVES = 0.0


_UNEQUAL_EXPERTS = (
    "The other ranks wait for it in the combine: place its busy experts apart, or replicate them; `moe-trace "
    "placement` says what either would give."
)
_UNEQUAL_TOKENS = "It routes more tokens than the others: give the ranks batches of equal size."


def hot_rank(evidence: Evidence) -> Iterator[Finding]:
    """A rank whose experts get more than their share of a layer's slots."""
    report = evidence.ranks
    for layer in report.layers if report is not None else ():
        ratio, total = layer.max_over_mean, sum(layer.load)
        if ratio is None or ratio < HOT_RANK or total < ENOUGH_PER_RANK * len(layer.load):
            continue
        expert = ""
        if layer.hot_expert is not None and layer.hot_expert_share is not None:
            share = f"{100 * layer.hot_expert_share:.0f} %"
            expert = f"; its busiest expert, {layer.hot_expert}, takes {share} of that"
        yield Finding(
            rule="hot_rank",
            site=layer.site,
            value=ratio,
            threshold=HOT_RANK,
            sentence=f"{layer.site}: rank {layer.hot_rank} computes {ratio:.2f}× the mean rank's share of "
            f"{total:,} slots{expert}.",
            advice=_UNEQUAL_EXPERTS if report is not None and report.exchange else _UNEQUAL_TOKENS,
        )


def waiting_ranks(evidence: Evidence) -> Iterator[Finding]:
    """Time that the ranks lose waiting for the last of them."""
    report = evidence.ranks
    if report is None or report.wait_share is None or report.wait_us is None:
        return
    if report.wait_share < WAIT_SHARE or not any(report.waited_for_us.values()):
        return
    last = max(report.waited_for_us, key=report.waited_for_us.__getitem__)
    part = report.waited_for_us[last] / report.wait_us
    yield Finding(
        rule="waiting_ranks",
        site=None,
        value=report.wait_share,
        threshold=WAIT_SHARE,
        sentence=f"Ranks spend {100 * report.wait_share:.0f} % of their time waiting in the MoE layers' "
        f"collectives, {100 * part:.0f} % of it for rank {last}.",
        advice="Waits before the dispatch come from unequal tokens or attention, waits before the combine "
        "from unequal experts: compare the parts in the table of collectives.",
    )


def bytes_differ(evidence: Evidence) -> Iterator[Finding]:
    """All-to-alls that moved other bytes than the recorded counts say."""
    check = evidence.ranks.bytes_check if evidence.ranks is not None else None
    if check is None or not check.different:
        return
    first = check.mismatches[0]
    yield Finding(
        rule="bytes_differ",
        site=first.site,
        value=check.different,
        threshold=BYTES_DIFFERENT,
        sentence=f"{check.different} of {check.equal + check.different} compared all-to-alls moved other "
        f"bytes than the counts say, first {first.site}, step {first.step}, rank {first.rank}: its "
        f"{first.part} {first.direction} {first.found_bytes:,} bytes with rank {first.peer}, expected "
        f"{first.expected_bytes:,}.",
        advice="The exchange drops, pads or compresses tokens, or the traces are of different runs: look at "
        "the experts' dispatch before you trust loads per rank.",
    )


def clocks_disagree(evidence: Evidence) -> Iterator[Finding]:
    """Clocks that no constant offset brings together."""
    alignment = evidence.ranks.alignment if evidence.ranks is not None else None
    if alignment is None or not alignment.early_after:
        return
    yield Finding(
        rule="clocks_disagree",
        site=None,
        value=alignment.early_after,
        threshold=EARLY_RECEIVES,
        sentence=f"{alignment.early_after} receives end before their send began, even after alignment.",
        advice="The ranks' clocks drift apart during the trace: record fewer steps, and distrust waits "
        "below the residual.",
    )


RULES = (bytes_differ, hot_rank, waiting_ranks, clocks_disagree)
