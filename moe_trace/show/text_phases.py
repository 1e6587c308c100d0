"""Phases, speed and the cost of imbalance as text."""

from __future__ import annotations

from moe_trace.data.tables import number, paragraph, printable, scaled, share, table
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.layers import LayerPhases, PhaseReport, PhaseTime
from moe_trace.read.time.structure import PHASES


def phase_parts(summary: TraceSummary) -> list[str]:
    """Where the time goes: a table forward, one backward if there is any, and the shares in a sentence."""
    report = summary.phases
    if report is None:
        return []
    clock = "device" if report.whole.on_device else "host"
    parts = [
        f"Phases forward, {clock} time of one call in µs (gap: no {_worker(report)} ran)\n"
        + _forward_table(report)
    ]
    if report.total.backward is not None:
        parts.append(f"Phases backward, {clock} time of one call in µs\n" + _backward_table(report))
    parts.append(shares_sentence(report))
    return parts


def _worker(report: PhaseReport) -> str:
    return "kernel" if report.whole.on_device else "operator"


def phase_us(phase: PhaseTime, report: PhaseReport) -> float:
    """Device busy time where there is a device, else time in operators."""
    busy = phase.device_busy_us
    return busy if report.whole.on_device and busy is not None else phase.host_us


def gap_and_block(layer: LayerPhases) -> tuple[float, float]:
    """Gap and whole of the block: on the device where there is one, else on the host."""
    if layer.device_span_us is not None and layer.device_gap_us is not None:
        return layer.device_gap_us, layer.device_span_us
    return layer.host_gap_us, layer.block_host_us


def _forward_table(report: PhaseReport) -> str:
    phases = _used(report)
    rows = []
    for layer in (*report.layers, report.total):
        gap, block = gap_and_block(layer)
        values = [phase_us(layer.forward[p], report) for p in phases]
        rows.append([printable(layer.site, 12), *(number(v / layer.calls) for v in (*values, gap, block))])
    total_gap, total_block = gap_and_block(report.total)
    shares = [phase_us(report.total.forward[p], report) for p in phases]
    rows.append(
        ["share", *(share(v / total_block if total_block else None) for v in (*shares, total_gap)), ""]
    )
    return table(["layer", *phases, "gap", "block"], rows)


def _backward_table(report: PhaseReport) -> str:
    phases = _used(report)
    rows = []
    for layer in (*report.layers, report.total):
        if layer.backward is not None:
            values = [phase_us(layer.backward[p], report) for p in phases]
            cells = (number(v / layer.calls) for v in (*values, sum(values)))
            rows.append([printable(layer.site, 12), *cells])
    return table(["layer", *phases, "all"], rows)


def _used(report: PhaseReport) -> list[str]:
    """Leave out the columns of phases that no layer has."""
    used: list[str] = []
    for phase in PHASES:
        both = (report.total.forward, report.total.backward or {})
        if any(phase_us(times[phase], report) for times in both if phase in times):
            used.append(phase)
    return used


def shares_sentence(report: PhaseReport) -> str:
    """`MoE is 71 % of device time; the router 0.9 %; dispatch and combine 23 %.`"""
    clock = "device time" if report.whole.on_device else "time in operators"
    forward, backward = report.total.forward, report.total.backward
    work = report.whole.moe_work_us

    def part(*names: str) -> str:
        us = sum(phase_us(forward[n], report) for n in names)
        us += sum(phase_us(backward[n], report) for n in names) if backward is not None else 0.0
        return share(us / work if work else None)

    whole = report.whole.moe_share_of_model
    lines = [f"MoE is {share(whole)} of the model's {clock}." if whole is not None else ""]
    lines.append(
        f"Of MoE's {clock}: router {part('router')}, dispatch and combine {part('dispatch', 'combine')}, "
        f"experts {part('experts')}."
    )
    if report.whole.moe_share_of_step is not None:
        lines.append(
            f"On the host MoE blocks take {share(report.whole.moe_share_of_step)} of the profiler's steps."
        )
    return paragraph(" ".join(filter(None, lines)))


def speed_part(summary: TraceSummary) -> list[str]:
    """Achieved rates, with the peak that they are compared with."""
    speed = summary.speed
    if speed is None:
        return []
    known = speed.peak_flops_per_s is not None
    rows = [
        [
            printable(layer.site, 12),
            scaled(layer.router.flops_per_s),
            scaled(layer.experts.flops_per_s),
            share(layer.experts.share_of_peak) if known else "-",
            number(layer.experts.intensity),
            layer.experts.bound or "-",
        ]
        for layer in speed.layers
    ]
    headings = ("layer", "router FLOP/s", "experts FLOP/s", "of peak", "FLOP/byte", "bound by")
    device = printable(speed.device or "no device in the trace", 40)
    peak = f"peak {scaled(speed.peak_flops_per_s, 'FLOP/s')}" if known else "peak unknown"
    bandwidth = speed.peak_bytes_per_s
    memory = f", {scaled(bandwidth, 'B/s')}" if bandwidth is not None else ""
    return [
        f"Speed ({device}, {printable(speed.dtype or 'unknown type')}, {peak}{memory})\n"
        + table(headings, rows)
    ]


def imbalance_lines(summary: TraceSummary) -> list[str]:
    """What uneven load costs, where the calls can tell."""
    if not summary.imbalance:
        return []
    told = [cost for cost in summary.imbalance if cost.verdict != "cannot tell"]
    parts = []
    if told:
        rows = [
            [
                printable(cost.site, 12),
                number(cost.measured_us),
                number(cost.equal_load_us),
                number(cost.cost_us),
                f"{number(cost.low_us)} to {number(cost.high_us)}",
                cost.verdict,
            ]
            for cost in told
        ]
        headings = ("layer", "measured", "equal load", "cost", "95 % interval", "verdict")
        parts.append("Cost of imbalance (experts' time of one call in µs)\n" + table(headings, rows))
    untold = [cost for cost in summary.imbalance if cost.verdict == "cannot tell"]
    if untold:
        reasons = "; ".join(dict.fromkeys(cost.reason for cost in untold))
        where = "any layer" if not told else f"{len(untold)} layers"
        parts.append(paragraph(f"Cost of imbalance: cannot tell for {where} ({reasons})."))
    return ["\n\n".join(parts)]
