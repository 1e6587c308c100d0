"""The ranks of a run as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_trace.data.display.columns import Cell, count_column, text_table
from moe_trace.data.display.tables import number, share, wrapped
from moe_trace.read.analysis import TraceSummary

if TYPE_CHECKING:
    from moe_trace.read.file.rank_parts import Alignment, Spread
    from moe_trace.read.ranks.collective_costs import ExchangeTime
    from moe_trace.read.ranks.report import LayerRanks, RankReport

COLUMNS_MAX = 4
MATRIX_MAX = 8


def rank_parts(summary: TraceSummary) -> list[str]:
    """Render load, all-to-all and waiting; nothing for a single rank."""
    report = summary.ranks
    if report is None:
        return []
    parts = ["Ranks\n" + "\n".join(wrapped(line) for line in rank_sentences(report))]
    if report.layers:
        parts.append(_load_table(report))
    if report.exchanges:
        parts.append(_exchange_table(report))
    matrix = _matrix(report)
    return [*parts, matrix] if matrix else parts


def rank_sentences(report: RankReport) -> list[str]:
    """Describe the ranks, the alignment of their clocks, waiting, the check of bytes, and load over time."""
    return [
        _ranks_line(report),
        *clock_lines(report.alignment),
        *_waiting(report),
        *_bytes(report),
        *_imbalance_over_steps(report),
    ]


def _ranks_line(report: RankReport) -> str:
    mesh = " × ".join(f"{name} {size}" for name, size in report.mesh.items())
    shared = [s for s in report.token_sets if len(s) > 1]
    tokens = "each rank routes tokens of its own"
    if shared:
        sets = " and ".join("(" + ", ".join(map(str, s)) + ")" for s in shared)
        tokens = f"ranks {sets} route the same tokens, which count once"
    exchange = f", experts by {report.exchange}" if report.exchange else ""
    found = f"{len(report.ranks)} of {report.world_size} ranks"
    return f"{found}{f' ({mesh}{exchange})' if mesh else ''}: {tokens}."


def _waiting(report: RankReport) -> list[str]:
    if report.wait_us is None or not any(report.waited_for_us.values()):
        return []
    last = max(report.waited_for_us, key=report.waited_for_us.__getitem__)
    part = f" ({share(report.wait_share)} of their time)" if report.wait_share is not None else ""
    return [
        f"The ranks wait {number(report.wait_us / 1000)} ms{part} in the MoE layers' collectives, "
        f"{share(report.waited_for_us[last] / report.wait_us)} of it for rank {last}."
    ]


def _bytes(report: RankReport) -> list[str]:
    check = report.bytes_check
    compared = check.equal + check.different
    if compared:
        unknown = f"; {check.unknown} could not be compared" if check.unknown else ""
        equal = f"{check.equal} of {compared} comparisons"
        return [f"All-to-all bytes equal what the counts say in {equal}{unknown}."]
    if check.unknown:
        return ["The traces have no split sizes to compare with the counts; on gloo record_shapes adds them."]
    return []


def _imbalance_over_steps(report: RankReport) -> list[str]:
    known = [step.imbalance for step in report.steps if step.imbalance is not None]
    if not known:
        return []
    least, most = f"{min(known):.3f}", f"{max(known):.3f}"
    steps = f"{least} in every step" if least == most else f"{least} to {most}, by step"
    return [f"Load max÷mean over ranks: {steps}."]


def clock_lines(alignment: Alignment) -> list[str]:
    """Describe how the clocks were aligned, and the residual."""
    lines = [_method(alignment)]
    if alignment.after is not None:
        before = f" ({alignment.early_before} before alignment)" if alignment.early_before else ""
        lines.append(
            f"The ranks end a shared collective {_spread_text(alignment.after)} apart (the residual); "
            f"{alignment.early_after} receives end before their send began{before}."
        )
    return [*lines, *alignment.notes]


def _method(alignment: Alignment) -> str:
    if alignment.after is None:
        return "The clocks are as recorded: the ranks share no collective that could align them."
    if alignment.same_host:
        return (
            f"The ranks share one host's clock, which was kept; {alignment.collectives} shared collectives "
            "agree with it."
        )
    moved = [
        f"rank {rank} {offset / 1000:+,.3f} µs"
        for rank, offset in alignment.offset_ns.items()
        if rank != alignment.reference and rank not in alignment.unaligned
    ]
    offsets = ", ".join(moved[:COLUMNS_MAX]) + (", …" if len(moved) > COLUMNS_MAX else "")
    collectives = f"{alignment.collectives} shared collectives"
    return f"Clocks aligned to rank {alignment.reference} by {collectives}: {offsets}."


def _spread_text(spread: Spread) -> str:
    return (
        f"{number(spread.median_us)} µs (median), {number(spread.p95_us)} µs (95 %), "
        f"{number(spread.max_us)} µs (most)"
    )


# -- tables ----------------------------------------------------------------------------------------------


def _load_table(report: RankReport) -> str:
    is_small = len(report.ranks) <= COLUMNS_MAX
    loads = [f"rank {rank}" for rank in report.ranks] if is_small else ["least", "mean", "most"]
    headings = ["layer", *loads, "max÷mean", "hot expert", "wait ms", "for rank"]
    rows = [_load_row(layer, few=is_small) for layer in report.layers]
    return text_table(headings, rows, title="Assignments that each rank computes, and time lost in waiting")


def _load_row(layer: LayerRanks, *, few: bool) -> tuple[Cell, ...]:
    mean = sum(layer.load) / len(layer.load)
    loads = layer.load if few else (min(layer.load), round(mean), max(layer.load))
    hot = None if layer.hot_expert is None else f"{layer.hot_expert} ({share(layer.hot_expert_share)})"
    wait_ms = None if layer.wait_us is None else layer.wait_us / 1000
    return (layer.site, *loads, layer.max_over_mean, hot, wait_ms, layer.waited_for)


def _exchange_table(report: RankReport) -> str:
    """Render totals over all ranks; the bandwidth is that of a mean rank."""
    groups: dict[tuple[str, str], list[ExchangeTime]] = {}
    for exchange in report.exchanges:
        groups.setdefault((exchange.site, exchange.part), []).append(exchange)
    rows = [(site, part, *_exchange_cells(of)) for (site, part), of in groups.items()]
    clock = (
        "their kernels"
        if all(exchange.on_device for exchange in report.exchanges)
        else "the backend's thread"
    )
    sizes = (count_column("bytes", "B"), count_column("leaving", "B"))
    headings = ("layer", "part", "calls", *sizes, "time ms", "wait ms", "GB/s")
    title = (
        f"Collectives of the MoE layers, all ranks together (time of {clock}; "
        "leaving: bytes to other ranks; GB/s: those ÷ time without waiting)"
    )
    return text_table(headings, rows, left=2, title=title)


def _exchange_cells(members: Sequence[ExchangeTime]) -> tuple[Cell, ...]:
    def total(values: Sequence[float | None]) -> float | None:
        return None if any(v is None for v in values) else sum(v for v in values if v is not None)

    time_us = total([exchange.time_us for exchange in members])
    wait_us, leaving = (
        total([exchange.wait_us for exchange in members]),
        total([exchange.bytes_leaving for exchange in members]),
    )
    moving_us = (time_us or 0.0) - (wait_us or 0.0)
    untimed = any(exchange.timed < exchange.calls for exchange in members)
    return (
        sum(exchange.calls for exchange in members),
        *(total([exchange.bytes_in for exchange in members]), leaving),
        *(None if us is None else us / 1000 for us in (time_us, wait_us)),
        None if leaving is None or moving_us <= 0 or untimed else leaving / moving_us / 1000,
    )


def _matrix(report: RankReport) -> str:
    layers = [layer.sent for layer in report.layers if layer.sent is not None]
    if not layers or len(layers) != len(report.layers) or report.world_size > MATRIX_MAX:
        return ""
    rows: list[tuple[Cell, ...]] = []
    for row, rank in enumerate(report.ranks):
        sums = [sum(layer[row][to] for layer in layers) for to in range(report.world_size)]
        rows.append((f"rank {rank}", *sums, sum(sums)))
    headings = ("from", *(f"to {to}" for to in range(report.world_size)), "all")
    return text_table(headings, rows, title="Assignments sent, over all layers")
