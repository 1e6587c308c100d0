"""Phases and speed as text."""

from __future__ import annotations

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.display.columns import Column, count_column, text_table
from moe_trace.data.display.tables import number, paragraph, printable, scaled, share, table
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.layers import LayerPhases, Pass, PhaseReport
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.show.figures.time import part_us

_CALL_NOUNS = {"forward": "forward call", "recompute": "recomputed call", "backward": "backward"}


def phase_parts(summary: TraceSummary) -> list[str]:
    """Render where the time goes: a table per pass, and the shares in a sentence."""
    report = summary.phases
    if report is None:
        return []
    return [*(_pass_part(report, part) for part in report.passes()), shares_sentence(report)]


def _pass_part(report: PhaseReport, part: Pass) -> str:
    clock = "device" if report.whole.on_device else "host"
    worker = "kernel" if report.whole.on_device else "operator"
    gap = "" if part == "backward" else f" (gap: no {worker} ran)"
    noun = _CALL_NOUNS[part] + ("" if report.total.count(part) == 1 else "s")
    mark = f", {BY_COMPILER}" if report.provenance is not None else ""
    title = f"Breakdown {part}, {clock} µs{mark}, mean of {report.total.count(part):,} {noun}{gap}"
    return f"{paragraph(title)}\n{_pass_table(report, part)}"


def _pass_table(report: PhaseReport, part: Pass) -> str:
    phases = _used(report)
    last = ("all",) if part == "backward" else ("gap", "block")
    rows = []
    for layer in (*report.layers, report.total):
        count = layer.count(part)
        if count:
            means = [number(value / count) for value in _values(report, layer, part)]
            rows.append([printable(layer.site, 12), *means])
    totals = _values(report, report.total, part)
    rows.append(["a step", *(number(value / report.steps) for value in totals)])
    rows.append(["total ms", *(number(value / 1000) for value in totals)])
    rows.append(["share", *(share(v / totals[-1] if totals[-1] else None) for v in totals[:-1]), ""])
    return table(["layer", *phases, *last], rows)


def _values(report: PhaseReport, layer: LayerPhases, part: Pass) -> list[float]:
    """Return the phases of a pass, then gap and block; for the backward, then only their sum."""
    us = part_us(layer, "device" if report.whole.on_device else "host", part)
    values = [us[phase] for phase in _used(report)]
    last = [sum(values)] if part == "backward" else [us.get("gap", 0.0), us.get("block", 0.0)]
    return [*values, *last]


def _used(report: PhaseReport) -> list[str]:
    """Leave out phases that took no time in any pass."""
    passes = [report.total.phases_of(part) or {} for part in report.passes()]
    return [
        phase for phase in PHASES if any(report.work_us(times[phase]) for times in passes if phase in times)
    ]


def shares_sentence(report: PhaseReport) -> str:
    """Summarize the shares, as in `MoE is 71 % of the model's busy device time. …: router 0.9 %, …`"""
    clock = "busy device time" if report.whole.on_device else "time in operators"
    passes = {part: report.total.phases_of(part) for part in report.passes()}
    work = report.whole.moe_work_us

    def us(*names: str) -> float:
        return sum(report.work_us(times[n]) for times in passes.values() if times for n in names)

    moe_share = report.whole.moe_share_of_model
    passes_of = {"forward": report.whole.moe_share_of_forward, "backward": report.whole.moe_share_of_backward}
    of_passes = ", ".join(f"{share(part)} of its {name}" for name, part in passes_of.items())
    of_passes += " with recompute" * bool(passes.get("recompute"))
    detail = f" ({of_passes})" if None not in passes_of.values() else ""
    lines = [f"MoE is {share(moe_share)} of the model's {clock}{detail}." if moe_share is not None else ""]
    by_phase = (("router",), ("dispatch", "combine"), ("experts",))
    parts = [f"{' and '.join(names)} {share(us(*names) / work if work else None)}" for names in by_phase]
    lines.append(f"Of MoE's {clock}: {', '.join(parts)}.")
    if len(passes) > 1:
        sums = [sum(report.work_us(time) for time in (times or {}).values()) for times in passes.values()]
        shares = [share(value / work if work else None) for value in sums]
        parts = [f"{part} {value}" for part, value in zip(passes, shares, strict=True)]
        lines.append(f"By pass: {', '.join(parts)}.")
    if work is not None:
        tokens = f", {number(work / report.tokens)} µs a token" if report.tokens else ""
        lines.append(f"That is {number(work / report.steps / 1000)} ms a step{tokens}.")
    if report.whole.moe_share_of_step is not None:
        lines.append(
            f"On the host MoE blocks take {share(report.whole.moe_share_of_step)} of the profiler's steps."
        )
    if report.provenance is not None:
        lines.append(f"Inside compiled code these times are {report.provenance}.")
    return paragraph(" ".join(filter(None, lines)))


def speed_part(summary: TraceSummary) -> list[str]:
    """Render the achieved rates with the peak that they are compared with."""
    speed = summary.speed
    if speed is None:
        return []
    known = speed.peak_flops_per_s is not None
    rows = [
        (
            layer.site,
            *(layer.router.flops_per_s, layer.experts.flops_per_s, layer.experts.flops_per_s_with_gaps),
            *(layer.experts.share_of_peak if known else None, layer.experts.intensity, layer.experts.bound),
        )
        for layer in speed.layers
    ]
    rates = [count_column(label) for label in ("router", "experts", "with gaps")]
    headings: list[Column | str] = ["layer", *rates, Column("of peak", terminal=share)]
    headings += ["FLOP/byte", "bound by"]
    device = printable(speed.device or "no device in the trace", 40)
    peak = f"peak {scaled(speed.peak_flops_per_s, 'FLOP/s')}" if known else "peak unknown"
    bandwidth = speed.peak_bytes_per_s
    memory = f", {scaled(bandwidth, 'B/s')}" if bandwidth is not None else ""
    report = summary.phases
    mark = f", times {BY_COMPILER}" if report is not None and report.provenance is not None else ""
    title = (
        f"Speed ({device}, {printable(speed.dtype or 'unknown type')}, {peak}{memory}{mark}). "
        "FLOP/s of the router's and the experts' phase without gaps, and of the experts' range with gaps"
    )
    return [text_table(headings, rows, title=title)]
