"""Findings about routing decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_trace.data.load_stats import ENOUGH_PER_EXPERT
from moe_trace.data.summary import RouterSummary
from moe_trace.read.findings.finding import Evidence, Finding, count, in_one_line, percent
from moe_trace.read.time.imbalance import saved_by

HOT_SHARE = 3.0
DEAD_SHARE = 0.0
PADDING_SHARE = 0.1
SKIPPED_SHARE = 0.01
NONFINITE_SHARE = 0.0
UNSURE = 0.05
COLLAPSED = 0.95


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN or infinite logits."""
    found = [(r.nonfinite_tokens, r) for r in evidence.routers if r.nonfinite_tokens]
    if found:
        found.sort(key=lambda pair: -pair[0])
        layers = [(r.info.site, f"{tokens:,}") for tokens, r in found]
        yield _finding_of_layers(
            found,
            NONFINITE_SHARE,
            sentence=f"{count(sum(tokens for tokens, _ in found), 'token')} had NaN or infinite router "
            f"logits: {in_one_line(layers)}.",
            advice="Run the router in float32, and look for the first layer where they appear.",
        )


def hot_expert(evidence: Evidence) -> Iterator[Finding]:
    """Find experts that get a multiple of their share, beyond chance."""
    uneven = [
        (r.load.max_over_mean, r)
        for r in evidence.routers
        if r.load.max_over_mean is not None
        and r.load.max_over_mean >= HOT_SHARE
        and r.chance.tells_dead
        and r.chance.is_real
    ]
    if not uneven:
        return
    uneven.sort(key=lambda pair: (-pair[0], -(pair[1].chance.cv_beyond or 0.0)))  # many tie at the ceiling
    worst = uneven[0][1]
    others = [(r.info.site, f"expert {_busiest_expert(r)} {ratio:.1f}×") for ratio, r in uneven[1:]]
    ceiling = worst.chance.ceiling
    ceiling_note = f", most possible {ceiling:.1f}×" if ceiling is not None else ""
    yield _finding_of_layers(
        uneven,
        HOT_SHARE,
        sentence=f"{worst.info.site}: expert {_busiest_expert(worst)} gets {uneven[0][0]:.1f}× its share of "
        f"the assignments (threshold {HOT_SHARE:.0f}×{ceiling_note})"
        + (f"; also {in_one_line(others)}." if others else "."),
        advice=_advice_of_load(evidence),
    )


def _advice_of_load(evidence: Evidence) -> str:
    if evidence.ranks is not None and evidence.ranks.exchange is not None:
        return (
            "The rank that holds it is waited for: place busy experts apart or replicate them (`moe-trace "
            "placement` says what either gives)."
        )
    if evidence.stage == "train":
        return "If it does not fall by itself, raise the balancing loss or the update rate of the bias."
    verdicts = {cost.verdict for cost in evidence.imbalance}
    if "costs" in verdicts:
        return "What that costs on this device is the finding on imbalance."
    if "saves" in verdicts:
        return (
            f"On this device an uneven load saves time: {saved_by(evidence.load_models)} Compare other text "
            "before you change the model for it."
        )
    return "Whether that costs time on this device, the trace does not tell; compare other text first."


def _busiest_expert(router: RouterSummary) -> int:
    return max(range(len(router.assignments)), key=router.assignments.__getitem__)


def dead_experts(evidence: Evidence) -> Iterator[Finding]:
    """Find experts without any token, despite enough tokens."""
    dead = [(len(r.load.dead_experts), r) for r in evidence.routers]
    found = sorted(
        (pair for pair in dead if pair[0] and pair[1].chance.tells_dead), key=lambda pair: -pair[0]
    )
    if not found:
        return
    total = sum(number for number, _ in found)
    layers = [(r.info.site, f"{number} of {r.info.num_experts} ({_ids(r)})") for number, r in found]
    yield _finding_of_layers(
        found,
        DEAD_SHARE,
        sentence=f"{count(total, 'expert')} in {count(len(found), 'layer')} got no token, though their "
        f"layers made at least {ENOUGH_PER_EXPERT} assignments an expert: {in_one_line(layers)}.",
        advice="Record more varied text before you call them useless: on this text their weights take memory "
        "for nothing."
        + (" In training look at the router's bias and balancing loss." if evidence.stage == "train" else ""),
    )


def _ids(router: RouterSummary) -> str:
    dead = router.load.dead_experts
    return ", ".join(map(str, dead[:3])) + (", …" if len(dead) > 3 else "")


def padding(evidence: Evidence) -> Iterator[Finding]:
    """Find a large share of assignments from padding tokens."""
    total = sum(sum(router.assignments) for router in evidence.routers)
    share = sum(router.padding_assignments for router in evidence.routers) / total if total else 0.0
    if share > PADDING_SHARE:
        report = evidence.phases
        known = report is not None and report.whole.moe_work_us is not None
        work_us = report.work_us(report.total.forward["experts"]) if report is not None and known else None
        yield Finding(
            value=share,
            threshold=PADDING_SHARE,
            cost_us=share * work_us if work_us is not None else None,
            sentence=f"{percent(share)} of assignments are padding (threshold {percent(PADDING_SHARE)}).",
            advice="The experts compute them all the same, and they tilt the load: sort prompts by length, "
            "or pack them without padding.",
        )


def skipped(evidence: Evidence) -> Iterator[Finding]:
    """Find slots that contributed no expert output."""
    shares = [(r.skipped / (r.skipped + sum(r.assignments)), r) for r in evidence.routers if r.skipped]
    found = sorted((pair for pair in shares if pair[0] > SKIPPED_SHARE), key=lambda pair: -pair[0])
    if found:
        yield _finding_of_layers(
            found,
            SKIPPED_SHARE,
            sentence=f"In {count(len(found), 'layer')} over {percent(SKIPPED_SHARE)} of assignments were "
            f"skipped: {in_one_line([(r.info.site, percent(share)) for share, r in found])}.",
            advice="Tokens are dropped at the experts' capacity, or the model skips on purpose: compare "
            "the k histogram with what the architecture says.",
        )


def undecided_router(evidence: Evidence) -> Iterator[Finding]:
    """Find routers that hardly distinguish between experts."""
    known = [(c, r) for r in evidence.routers if (c := r.decisions.confidence_mean) is not None]
    found = sorted((pair for pair in known if pair[0] < UNSURE), key=lambda pair: pair[0])
    if found:
        yield _finding_of_layers(
            found,
            UNSURE,
            sentence=f"The router hardly decides in {count(len(found), 'layer')} (confidence under "
            f"{UNSURE}): {in_one_line([(r.info.site, f'{c:.3f}') for c, r in found])}.",
            advice="Random weights look like this; in a trained model these routers have learnt little.",
        )


def collapsed_router(evidence: Evidence) -> Iterator[Finding]:
    """Find routers that are nearly certain of every token."""
    known = [(c, r) for r in evidence.routers if (c := r.decisions.confidence_mean) is not None]
    found = [(c, r) for c, r in known if c > COLLAPSED and r.info.num_experts > 1]
    found.sort(key=lambda pair: -pair[0])
    if found:
        yield _finding_of_layers(
            found,
            COLLAPSED,
            sentence=f"The router is nearly certain of every token in {count(len(found), 'layer')} "
            f"(confidence over {COLLAPSED}): {in_one_line([(r.info.site, f'{c:.3f}') for c, r in found])}.",
            advice="Its gradient vanishes there: look at the z-loss and at the scale of its logits.",
        )


def _finding_of_layers(
    found: Sequence[tuple[float, RouterSummary]], threshold: float, *, sentence: str, advice: str
) -> Finding:
    return Finding(
        site=found[0][1].info.site,
        sites=tuple(router.info.site for _, router in found),
        value=found[0][0],
        threshold=threshold,
        sentence=sentence,
        advice=advice,
    )


RULES = (nonfinite, hot_expert, dead_experts, padding, skipped, undecided_router, collapsed_router)
