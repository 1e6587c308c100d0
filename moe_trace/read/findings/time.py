"""Findings about time."""

from __future__ import annotations

from collections.abc import Iterator

from moe_trace.read.findings.finding import Evidence, Finding, count, duration, in_one_line, percent
from moe_trace.read.time.imbalance import slopes_in_words
from moe_trace.read.time.layers import PhaseReport

BUSY_SHARE = 0.1
GAP_SHARE = 0.5
MOVE_SHARE = 0.25
COST_SHARE = 0.05
PEAK_SHARE = 0.2
READ_SHARE = 0.5


def experts_untimed(evidence: Evidence) -> Iterator[Finding]:
    """Find layers whose router takes all the time: the experts' is counted as its own, or is in no range."""
    report = evidence.phases
    if report is None or report.whole.moe_work_us is None:
        return
    sites = []
    for layer in report.layers:
        us = {name: report.work_us(time) for name, time in layer.forward.items()}
        if us["router"] > 0 and us["router"] == sum(us.values()):
            sites.append(layer.site)
    if sites:
        yield Finding(
            site=sites[0],
            sites=tuple(sites),
            value=1.0,
            threshold=1.0,
            sentence=f"The router takes 100 % of MoE's time and the experts 0 % in "
            f"{count(len(sites), 'layer')} ({in_one_line([(site, '') for site in sites])}): the module that "
            "counts as the router holds the experts, or the trace has no block round both.",
            advice="Name the gate itself and the block that holds it: register_adapter(..., block=MyMoE, "
            'router="gate"), and record again.',
        )


def costly_imbalance(evidence: Evidence) -> Iterator[Finding]:
    """Find layers whose uneven load costs time."""
    costly = [
        (c.cost_us / c.measured_us, c, c.cost_us)
        for c in evidence.imbalance
        if c.verdict == "costs" and c.cost_us is not None and c.measured_us
    ]
    costly = sorted((cost for cost in costly if cost[0] > COST_SHARE), key=lambda cost: -cost[0])
    if not costly:
        return
    layers = [
        (
            c.site,
            f"{duration(cost)} a call, {percent(share)} (95 % interval {c.low_us:.3g} to {c.high_us:.3g} µs)",
        )
        for share, c, cost in costly
    ]
    model = next(m for m in evidence.load_models if costly[0][1].site in m.sites)
    against, remedy = "the most even load of the trace", "balance these layers first"
    if model.comparison == "ranks":
        against = "a mean rank's load"
        remedy = "place or replicate the busy experts of these layers (`moe-trace placement` plans it)"
    yield Finding(
        site=costly[0][1].site,
        sites=tuple(c.site for _, c, _ in costly),
        value=costly[0][0],
        threshold=COST_SHARE,
        cost_us=sum(cost * c.calls for _, c, cost in costly),
        sentence=f"Uneven load costs over {percent(COST_SHARE)} of the experts' time against {against}: "
        f"{in_one_line(layers)}.",
        advice=f"Here the experts take {slopes_in_words(model)} (this explains "
        f"{percent(model.held_out_r2 or 0.0)} of the variation of held-out calls): {remedy}.",
    )


def moving_tokens(evidence: Evidence) -> Iterator[Finding]:
    """Find a large share of dispatch and combine in MoE's forward; the cost includes all passes."""
    if evidence.phases is None:
        return
    forward = evidence.phases.total.forward
    share = (forward["dispatch"].share_of_moe or 0) + (forward["combine"].share_of_moe or 0)
    if share <= MOVE_SHARE:
        return
    advice = {
        "batched_mm": "batched_mm gathers the weights of every slot, which suits a few tokens only: try "
        "grouped_mm.",
        "grouped_mm": "A fused kernel for permuting and weighting the tokens would save most of it.",
        "eager": "The loop over experts moves the tokens of each expert by itself: try grouped_mm.",
    }
    yield Finding(
        value=share,
        threshold=MOVE_SHARE,
        cost_us=sum(_work_us(evidence.phases, name) for name in ("dispatch", "combine")),
        sentence=f"Dispatch and combine take {percent(share)} of MoE's forward work (threshold "
        f"{percent(MOVE_SHARE)}).",
        advice=advice.get(
            _implementation(evidence), "Tokens are moved a lot for what is computed with them."
        ),
    )


def _implementation(evidence: Evidence) -> str:
    return str(evidence.model.get("experts_implementation"))


def _work_us(report: PhaseReport, phase: str) -> float:
    """Return the work of a phase in all passes of the trace."""
    passes = [report.total.phases_of(part) or {} for part in report.passes()]
    return sum(report.work_us(times[phase]) for times in passes if phase in times)


def router_waits(evidence: Evidence) -> Iterator[Finding]:
    """Find routers whose kernels fill little of their span, unless `launch_gaps` covers the whole block."""
    if next(launch_gaps(evidence), None) is not None:
        return
    busy = [r.latency.device_busy.total for r in evidence.routers if r.latency.device_busy is not None]
    span = [r.latency.device_span.total for r in evidence.routers if r.latency.device_span is not None]
    if not busy or not sum(span) or sum(busy) / sum(span) >= BUSY_SHARE:
        return
    share = sum(busy) / sum(span)
    yield Finding(
        value=share,
        threshold=BUSY_SHARE,
        cost_us=sum(span) - sum(busy),
        sentence=f"The router waits on the host: device busy is {percent(share)} of its span (threshold "
        f"{percent(BUSY_SHARE)}), {duration(sum(span) - sum(busy))} are idle.",
        advice=_how_to_launch(evidence),
    )


def launch_gaps(evidence: Evidence) -> Iterator[Finding]:
    """Find blocks whose device time is mostly gaps, including recomputed blocks."""
    total = evidence.phases.total if evidence.phases is not None else None
    blocks = [block for block in (total, total.recompute if total is not None else None) if block is not None]
    span_us = sum(block.device_span_us or 0.0 for block in blocks)
    gap_us = sum(block.device_gap_us or 0.0 for block in blocks)
    if not span_us or gap_us / span_us <= GAP_SHARE:
        return
    loop = "The loop over experts launches kernels for each of them: try grouped_mm. "
    yield Finding(
        value=gap_us / span_us,
        threshold=GAP_SHARE,
        cost_us=gap_us,
        sentence=f"{percent(gap_us / span_us)} of the MoE blocks' time on the device, first kernel to "
        f"last{_recompute_note(evidence.phases)}, is gaps between kernels (threshold {percent(GAP_SHARE)}): "
        f"{duration(gap_us)} of {duration(span_us)}.",
        advice=(loop if _implementation(evidence) == "eager" else "") + _how_to_launch(evidence),
    )


def _how_to_launch(evidence: Evidence) -> str:
    compiled = evidence.phases is not None and evidence.phases.provenance is not None
    how = "torch.compile's mode='reduce-overhead'" if compiled else "torch.compile (mode='reduce-overhead')"
    return (
        f"The host launches more slowly than the device works: use CUDA graphs, {how}, or larger batches. A "
        "profiler itself slows launches: compare with the step's time without it."
    )


def _recompute_note(report: PhaseReport | None) -> str:
    return " (forward and recomputed calls)" if report is not None and report.total.recompute else ""


def far_from_peak(evidence: Evidence) -> Iterator[Finding]:
    """Find expert products far below the device's peak."""
    rate = evidence.speed.experts if evidence.speed is not None else None
    if rate is None or rate.share_of_peak is None or rate.share_of_peak >= PEAK_SHARE:
        return
    advice = {
        "memory": "Few tokens per expert: reading the weights from memory binds, and larger batches raise "
        "the rate. What is above the roofline is the kernels': they read more slowly than the memory allows.",
        "arithmetic": "Enough work per byte is there: look at the sizes per expert, and at the kernels.",
    }
    yield Finding(
        value=rate.share_of_peak,
        threshold=PEAK_SHARE,
        cost_us=rate.above_roofline_us,
        sentence=f"The experts' products{_recompute_note(evidence.phases)} reach "
        f"{percent(rate.share_of_peak)} of the device's peak FLOP/s (threshold {percent(PEAK_SHARE)})"
        + (
            f", and take {duration(rate.above_roofline_us)} more than the roofline allows."
            if rate.above_roofline_us is not None
            else "."
        ),
        advice=advice.get(rate.bound or "", "Compare tokens per expert with the roofline's ridge."),
    )


def weights_bind(evidence: Evidence) -> Iterator[Finding]:
    """Find forwards whose experts take little longer than reading their weights must."""
    report = evidence.distinct
    if report is None or not report.on_device:
        return
    size = max(report.sizes, key=lambda size: size.calls)
    if not size.least_us or not size.experts_us or size.least_us / size.experts_us < READ_SHARE:
        return
    share = size.least_us / size.experts_us
    yield Finding(
        value=share,
        threshold=READ_SHARE,
        sentence=f"In forwards of {size.label} token{'' if size.tokens_max == 1 else 's'} a layer reads the "
        f"weights of {size.mean:.1f} of {size.experts:.0f} experts (uniform routing: {size.uniform:.1f}): at "
        f"least {duration(size.least_us)} of the {duration(size.experts_us)} that the experts take, "
        f"{percent(share)} (threshold {percent(READ_SHARE)}).",
        advice="Memory bandwidth binds them: more tokens a forward cost only the experts that they add, and "
        "narrower weights save their share of the bytes.",
    )


def uncounted_flops(evidence: Evidence) -> Iterator[Finding]:
    """Find products that torch's own FLOP counters omit."""
    flops = sum(router.flops.experts for router in evidence.routers)
    if "aten::_grouped_mm" in evidence.operators and flops:
        yield Finding(
            value=flops,
            threshold=0,
            sentence=f"`grouped_mm` FLOPs are missing from torch's own counters: {flops / 1e12:.3g} TFLOP of "
            "expert products.",
            advice="torch.utils.flop_counter counts 0 for aten::_grouped_mm, and so does with_flops on a "
            "GPU: use the figures here.",
        )


RULES = (experts_untimed, costly_imbalance, moving_tokens, router_waits, launch_gaps, far_from_peak)
