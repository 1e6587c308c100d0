"""A summary as text for 80 columns: findings first, then each stage, then notes."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.display.tables import paragraph, printable, screen_width, wrapped
from moe_trace.data.summary import Summary, model_name
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.findings.finding import FINDINGS_SHOWN, Finding
from moe_trace.show.text.distinct import distinct_part
from moe_trace.show.text.imbalance import imbalance_part
from moe_trace.show.text.load import load_parts
from moe_trace.show.text.phases import phase_parts, speed_part
from moe_trace.show.text.physical import physical_part
from moe_trace.show.text.ranks import rank_parts


def render_text(summary: Summary) -> str:
    """Render the findings, the metrics of each stage, and notes on how far to trust them."""
    parts = [_heading(summary)]
    if isinstance(summary, TraceSummary):
        parts += _findings(summary)
        for stage, part in summary.stages.items():
            parts += [_stage_heading(stage, part), *_figures(part)]
    if not isinstance(summary, TraceSummary) or not summary.stages:
        parts += _figures(summary)
    if summary.notes:
        parts.append("Notes\n" + "\n".join(wrapped(printable(note, 2000)) for note in summary.notes))
    return "\n\n".join(parts) + "\n"


def _figures(summary: Summary) -> list[str]:
    parts = load_parts(summary)
    if isinstance(summary, TraceSummary):
        parts += physical_part(summary)
        parts += [*phase_parts(summary), *speed_part(summary), *distinct_part(summary)]
        parts += imbalance_part(summary)
        parts += rank_parts(summary)
    return parts


def _findings(summary: TraceSummary) -> list[str]:
    if not summary.findings:
        return []
    sentences = _merge_stages(summary.findings)
    first, omitted = sentences[:FINDINGS_SHOWN], len(sentences) - FINDINGS_SHOWN
    lines = [wrapped(printable(sentence, 2000)) for sentence in first]
    if omitted > 0:
        lines.append(wrapped(f"… and {omitted} more; --format json has them all."))
    return ["Findings, worst first\n" + "\n".join(lines)]


def _merge_stages(findings: Sequence[Finding]) -> list[str]:
    """Merge findings that are equal in several stages, at the position of the worst, naming the stages."""
    stages: dict[str, list[str]] = {}
    for finding in findings:
        stage = finding.stage or ""
        sentence = finding.sentence.removeprefix(f"{stage.capitalize()}: ")
        stages.setdefault(f"{sentence} {finding.advice}", []).append(stage)
    return [
        f"{', '.join(names).capitalize()}: {text}" if any(names) else text for text, names in stages.items()
    ]


def _heading(summary: Summary) -> str:
    model = summary.model
    lines = [printable(model_name(model))]
    lines.append(paragraph(_facts(summary)))
    if isinstance(summary, TraceSummary) and summary.stages:
        stages = [f"{stage} ({part.totals.calls:,} calls)" for stage, part in summary.stages.items()]
        counted_twice = sum(part.totals.calls for part in summary.stages.values()) > summary.totals.calls
        also = "; the tokens of mixed calls count in prefill and decode, too" if counted_twice else ""
        lines.append(paragraph(f"Stages, each on its own below: {', '.join(stages)}{also}"))
    if summary.trace is not None:
        lines.insert(0, printable(summary.trace, 200))
    return "\n".join(lines)


def _stage_heading(stage: str, part: TraceSummary) -> str:
    title = f"=== {stage.capitalize()} "
    return f"{title}{'=' * (screen_width() - len(title))}\n{paragraph(_facts(part))}"


def _facts(summary: Summary) -> str:
    totals = summary.totals
    forward = "forward " if totals.recomputed_calls else ""
    facts = [f"{totals.routers} routers", f"{totals.calls:,} {forward}calls"]
    if totals.recomputed_calls:
        facts.append(f"{totals.recomputed_calls:,} recomputed calls (gradient checkpointing)")
    facts += [_steps(summary), f"{totals.tokens:,} routed tokens", f"{totals.assignments:,} assignments"]
    if totals.skipped:
        facts.append(f"{totals.skipped:,} skipped assignments")
    if totals.padding_assignments:
        facts.append(f"{totals.padding_assignments:,} of padding")
    if totals.requests_per_forward is not None:
        facts.append(f"{totals.requests_per_forward:,.1f} requests a forward")
    if isinstance(summary, TraceSummary) and summary.stage is not None:
        facts.append(f"stage {summary.stage}")
    return ", ".join(facts)


def _steps(summary: Summary) -> str:
    """Return the number of steps and, for steps of one stage, their tokens, counted once for all layers."""
    steps = summary.totals.steps
    if isinstance(summary, TraceSummary) and summary.stages:
        return f"{steps} {'step' if steps == 1 else 'steps'}"
    tokens = max((router.tokens for router in summary.routers), default=0)
    mean = tokens / steps if steps else 0.0
    each = f" of {mean:,.{0 if mean.is_integer() else 1}f} token{'' if mean == 1 else 's'}" if steps else ""
    return f"{steps} {'step' if steps == 1 else 'steps'}{each}"
