"""Findings about runs with several ranks; none of them applies to a single rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_trace.read.findings.finding import Evidence, Finding, in_one_line, percent

if TYPE_CHECKING:
    from moe_trace.read.ranks.report import LayerRanks

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
    """Find ranks whose experts get more than their share of a layer's slots."""
    report = evidence.ranks
    uneven = [
        (layer.max_over_mean, layer)
        for layer in (report.layers if report is not None else ())
        if layer.max_over_mean is not None
        and layer.max_over_mean >= HOT_RANK
        and sum(layer.load) >= ENOUGH_PER_RANK * len(layer.load)
    ]
    if not uneven or report is None:
        return
    uneven.sort(key=lambda pair: -pair[0])
    ratio, worst = uneven[0]
    others = [(layer.site, f"rank {layer.hot_rank} {of:.2f}×") for of, layer in uneven[1:]]
    yield Finding(
        site=worst.site,
        sites=tuple(layer.site for _, layer in uneven),
        value=ratio,
        threshold=HOT_RANK,
        cost_us=sum(layer.wait_us or 0.0 for _, layer in uneven) or None,
        sentence=f"{worst.site}: rank {worst.hot_rank} computes {ratio:.2f}× the mean rank's share of "
        f"{sum(worst.load):,} assignments (threshold {HOT_RANK}×){_expert_note(worst)}"
        + (f"; also {in_one_line(others)}." if others else "."),
        advice=_UNEQUAL_EXPERTS if report.exchange else _UNEQUAL_TOKENS,
    )


def _expert_note(layer: LayerRanks) -> str:
    if layer.hot_expert is None or layer.hot_expert_share is None:
        return ""
    return f"; its busiest expert, {layer.hot_expert}, takes {percent(layer.hot_expert_share)} of that"


def waiting_ranks(evidence: Evidence) -> Iterator[Finding]:
    """Find time that ranks lose waiting for the last one."""
    report = evidence.ranks
    if report is None or report.wait_share is None or report.wait_us is None:
        return
    if report.wait_share < WAIT_SHARE or not any(report.waited_for_us.values()):
        return
    last = max(report.waited_for_us, key=report.waited_for_us.__getitem__)
    part = report.waited_for_us[last] / report.wait_us
    yield Finding(
        value=report.wait_share,
        threshold=WAIT_SHARE,
        cost_us=report.wait_us,
        sentence=f"Ranks spend {100 * report.wait_share:.0f} % of their time waiting in the MoE layers' "
        f"collectives (threshold {percent(WAIT_SHARE)}), {100 * part:.0f} % of it for rank {last}.",
        advice="Waits before the dispatch come from unequal tokens or attention, waits before the combine "
        "from unequal experts: compare the parts in the table of collectives.",
    )


def bytes_differ(evidence: Evidence) -> Iterator[Finding]:
    """Find all-to-alls whose bytes differ from the recorded counts."""
    check = evidence.ranks.bytes_check if evidence.ranks is not None else None
    if check is None or not check.different:
        return
    first = check.mismatches[0]
    yield Finding(
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
    """Find clocks that no constant offset can align."""
    alignment = evidence.ranks.alignment if evidence.ranks is not None else None
    if alignment is None or not alignment.early_after:
        return
    yield Finding(
        value=alignment.early_after,
        threshold=EARLY_RECEIVES,
        sentence=f"{alignment.early_after} receives end before their send began, even after alignment.",
        advice="The ranks' clocks drift apart during the trace: record fewer steps, and distrust waits "
        "below the residual.",
    )


RULES = (hot_rank, waiting_ranks)
RUN_RULES = (bytes_differ, clocks_disagree)
