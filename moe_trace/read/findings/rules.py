"""What an engineer should look at: rules as small functions, each with a number, a threshold and advice.

A rule takes the `Evidence` and yields `Finding`s. Adding a rule is adding a function to `RULES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_trace.data.summary import RouterSummary
from moe_trace.read.findings import ranks as rank_findings
from moe_trace.read.findings.finding import Evidence, Finding, Rule

__all__ = ["RULES", "Evidence", "Finding", "Rule", "find"]


HOT_SHARE = 3.0
ENOUGH_PER_EXPERT = 20
DEAD_SHARE = 0.0
PADDING_SHARE = 0.1
SKIPPED_SHARE = 0.01
NONFINITE_SHARE = 0.0
UNSURE = 0.05
COLLAPSED = 0.95
BUSY_SHARE = 0.1
GAP_SHARE = 0.5
MOVE_SHARE = 0.25
COST_SHARE = 0.05
PEAK_SHARE = 0.2


def hot_expert(evidence: Evidence) -> Iterator[Finding]:
    """An expert that gets a multiple of its share."""
    for router in evidence.routers:
        ratio, total = router.load.max_over_mean, sum(router.assignments)
        if ratio is None or ratio < HOT_SHARE or total < ENOUGH_PER_EXPERT * len(router.assignments):
            continue
        expert = max(range(len(router.assignments)), key=router.assignments.__getitem__)
        yield Finding(
            rule="hot_expert",
            site=router.info.site,
            value=ratio,
            threshold=HOT_SHARE,
            sentence=f"{_layer(router)}: expert {expert} gets {ratio:.1f}× its share of "
            f"{total:,} assignments.",
            advice="Its device is the slowest under expert parallelism: replicate the expert "
            "(`moe-trace export --to eplb`), or raise the balancing loss in training.",
        )


def dead_experts(evidence: Evidence) -> Iterator[Finding]:
    """Experts without any token, though enough tokens came by."""
    for router in evidence.routers:
        dead, total = router.load.dead_experts, sum(router.assignments)
        if not dead or total < ENOUGH_PER_EXPERT * len(router.assignments):
            continue
        ids = ", ".join(map(str, dead[:8])) + (", …" if len(dead) > 8 else "")
        yield Finding(
            rule="dead_experts",
            site=router.info.site,
            value=len(dead),
            threshold=DEAD_SHARE,
            sentence=f"{_layer(router)}: {_count(len(dead), 'expert')} got no token in "
            f"{_count(router.calls, 'call')} ({ids}).",
            advice="Their weights take memory for nothing on this text: try more varied text before pruning "
            "them, and look at the router's bias and balancing loss.",
        )


def padding(evidence: Evidence) -> Iterator[Finding]:
    """Assignments that padding tokens made."""
    total = sum(sum(router.assignments) for router in evidence.routers)
    share = sum(router.padding_assignments for router in evidence.routers) / total if total else 0.0
    if share > PADDING_SHARE:
        yield Finding(
            rule="padding",
            site=None,
            value=share,
            threshold=PADDING_SHARE,
            sentence=f"{100 * share:.0f} % of assignments are padding.",
            advice="The experts compute them all the same, and they tilt the load: sort prompts by length, "
            "or pack them without padding.",
        )


def skipped(evidence: Evidence) -> Iterator[Finding]:
    """Slots that no expert's output came from."""
    for router in evidence.routers:
        slots = router.skipped + sum(router.assignments)
        if slots and router.skipped > SKIPPED_SHARE * slots:
            share = router.skipped / slots
            yield Finding(
                rule="skipped",
                site=router.info.site,
                value=share,
                threshold=SKIPPED_SHARE,
                sentence=f"{_layer(router)}: {100 * share:.1f} % of slots were skipped.",
                advice="Tokens are dropped at the experts' capacity, or the model skips on purpose: compare "
                "the k histogram with what the architecture says.",
            )


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """NaN or infinite logits."""
    for router in evidence.routers:
        if router.nonfinite_tokens:
            yield Finding(
                rule="nonfinite",
                site=router.info.site,
                value=router.nonfinite_tokens,
                threshold=NONFINITE_SHARE,
                sentence=f"{_layer(router)}: {_count(router.nonfinite_tokens, 'token')} had NaN or infinite "
                "router logits.",
                advice="Run the router in float32, and look for the first layer where they appear.",
            )


def undecided_router(evidence: Evidence) -> Iterator[Finding]:
    """Routers that hardly tell experts apart."""
    found = [
        (c, r) for r in evidence.routers if (c := r.decisions.confidence_mean) is not None and c < UNSURE
    ]
    if found:
        least = min(confidence for confidence, _ in found)
        yield Finding(
            rule="undecided_router",
            site=None,
            value=least,
            threshold=UNSURE,
            sentence=f"The router is nearly undecided in {_layers([r for _, r in found])} "
            f"(confidence down to {least:.3f}).",
            advice="Random weights look like this; in a trained model these routers have learnt little.",
        )


def collapsed_router(evidence: Evidence) -> Iterator[Finding]:
    """Routers that are certain of every token."""
    known = [(r.decisions.confidence_mean, r) for r in evidence.routers]
    found = [(c, r) for c, r in known if c is not None and c > COLLAPSED and r.info.num_experts > 1]
    if found:
        most = max(confidence for confidence, _ in found)
        yield Finding(
            rule="collapsed_router",
            site=None,
            value=most,
            threshold=COLLAPSED,
            sentence=f"The router is nearly certain in {_layers([r for _, r in found])} "
            f"(confidence up to {most:.3f}).",
            advice="Its gradient vanishes there: look at the z-loss and at the scale of its logits.",
        )


def router_waits(evidence: Evidence) -> Iterator[Finding]:
    """A router whose kernels fill little of their span."""
    busy = [r.latency.device_busy.total for r in evidence.routers if r.latency.device_busy is not None]
    span = [r.latency.device_span.total for r in evidence.routers if r.latency.device_span is not None]
    if not busy or not sum(span) or sum(busy) / sum(span) >= BUSY_SHARE:
        return
    share = sum(busy) / sum(span)
    yield Finding(
        rule="router_waits",
        site=None,
        value=share,
        threshold=BUSY_SHARE,
        sentence=f"The router waits on the host: device busy is {100 * share:.0f} % of its span.",
        advice="The device idles between launches: use CUDA graphs, torch.compile "
        "(mode='reduce-overhead'), or larger batches.",
    )


def launch_gaps(evidence: Evidence) -> Iterator[Finding]:
    """Blocks whose device time is mostly gaps."""
    total = evidence.phases.total if evidence.phases is not None else None
    if total is None or not total.device_span_us or total.device_gap_us is None:
        return
    share = total.device_gap_us / total.device_span_us
    if share > GAP_SHARE:
        yield Finding(
            rule="launch_gaps",
            site=None,
            value=share,
            threshold=GAP_SHARE,
            sentence=f"{100 * share:.0f} % of the MoE blocks' device time is gaps between kernels.",
            advice="The host launches more slowly than the device works: prefer grouped_mm over eager "
            "experts, CUDA graphs, or larger batches.",
        )


def moving_tokens(evidence: Evidence) -> Iterator[Finding]:
    """Dispatch and combine as a share of MoE."""
    if evidence.phases is None:
        return
    forward = evidence.phases.total.forward
    share = (forward["dispatch"].share_of_moe or 0) + (forward["combine"].share_of_moe or 0)
    if share > MOVE_SHARE:
        yield Finding(
            rule="moving_tokens",
            site=None,
            value=share,
            threshold=MOVE_SHARE,
            sentence=f"Dispatch and combine take {100 * share:.0f} % of MoE's forward work.",
            advice="Tokens or weights are moved more than they are computed with: batched_mm gathers the "
            "weights of every slot and suits a few tokens only; a fused permutation kernel helps grouped_mm.",
        )


def uncounted_flops(evidence: Evidence) -> Iterator[Finding]:
    """Products that torch's own FLOP counters leave out."""
    flops = sum(router.flops.experts for router in evidence.routers)
    if "aten::_grouped_mm" in evidence.operators and flops:
        yield Finding(
            rule="uncounted_flops",
            site=None,
            value=flops,
            threshold=0,
            sentence=f"`grouped_mm` FLOPs are missing from torch's own counters: {flops / 1e12:.3g} TFLOP of "
            "expert products.",
            advice="torch.utils.flop_counter counts 0 for aten::_grouped_mm, and so does with_flops on a "
            "GPU: use the figures here.",
        )


def costly_imbalance(evidence: Evidence) -> Iterator[Finding]:
    """Layers whose uneven load shows in their time."""
    for cost in evidence.imbalance:
        if cost.verdict != "costs" or cost.cost_us is None or not cost.measured_us:
            continue
        share = cost.cost_us / cost.measured_us
        if share > COST_SHARE:
            yield Finding(
                rule="costly_imbalance",
                site=cost.site,
                value=share,
                threshold=COST_SHARE,
                sentence=f"{cost.site}: uneven load costs {cost.cost_us:.0f} µs a call, {100 * share:.0f} % "
                f"of the experts' time (95 % interval {cost.low_us:.0f} to {cost.high_us:.0f} µs).",
                advice="Balance the experts of this layer first.",
            )


def far_from_peak(evidence: Evidence) -> Iterator[Finding]:
    """Expert products well below what the device can do, though arithmetic binds."""
    rate = evidence.speed.experts if evidence.speed is not None else None
    if rate is None or rate.share_of_peak is None or rate.share_of_peak >= PEAK_SHARE:
        return
    why = {
        "memory": "Too few tokens per expert: the weights' way from memory binds. Larger batches help.",
        "arithmetic": "Enough work per byte is there: look at the sizes per expert, and at the kernel.",
    }
    yield Finding(
        rule="far_from_peak",
        site=None,
        value=rate.share_of_peak,
        threshold=PEAK_SHARE,
        sentence=f"The experts reach {100 * rate.share_of_peak:.1f} % of the device's peak.",
        advice=why.get(rate.bound or "", "Compare tokens per expert with the roofline's ridge."),
    )


RULES: tuple[Rule, ...] = (
    nonfinite,
    hot_expert,
    dead_experts,
    *rank_findings.RULES,
    costly_imbalance,
    padding,
    skipped,
    undecided_router,
    collapsed_router,
    moving_tokens,
    router_waits,
    launch_gaps,
    far_from_peak,
    uncounted_flops,
)


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, in the order of the rules."""
    return tuple(finding for rule in RULES for finding in rule(evidence))


def _layer(router: RouterSummary) -> str:
    site = router.info.site
    return f"layer {router.info.layer}" if site == f"L{router.info.layer:02d}" else site


def _layers(routers: Sequence[RouterSummary]) -> str:
    if len(routers) == 1:
        return _layer(routers[0])
    sites = [router.info.site for router in routers]
    return f"{len(sites)} layers ({', '.join(sites[:4])}{', …' if len(sites) > 4 else ''})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
