"""The ranks of one run: side by side from their own traces, and combined where these share collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moe_trace.read.analysis import TraceSummary
from moe_trace.read.ranks.inputs import Ranks
from moe_trace.read.ranks.report import RankReport, report_ranks
from moe_trace.read.ranks.same_run import first_difference
from moe_trace.read.time.layers import LayerPhases
from moe_trace.show.figures.figure import Figure, Spec, bars, bars_layout, layers_map
from moe_trace.show.figures.ranks import rank_figures
from moe_trace.show.tensorboard.to_json import JsonDict, figures_by_key
from moe_trace.show.text.ranks import rank_sentences


def run_report(summaries: Sequence[TraceSummary]) -> RankReport | None:
    """Return the report of the ranks together, from one trace per rank or from a merged trace.

    None for a single rank, and for traces of different models or runs.
    """
    single = [summary for summary in summaries if summary.ranks is None]
    ranks = Ranks.of([rank_input for summary in single for rank_input in summary.rank_inputs])
    if (
        len(ranks.inputs) > 1
        and first_difference([rank_input.recording for rank_input in ranks.inputs]) is None
    ):
        return report_ranks(ranks)
    return next((summary.ranks for summary in summaries if summary.ranks is not None), None)


def together(report: RankReport | None) -> JsonDict | None:
    """Return the report as sentences and figures."""
    if report is None:
        return None
    return {
        "ranks": len(report.ranks),
        "sentences": list(dict.fromkeys((*rank_sentences(report), *report.notes))),
        "has_exchange": bool(report.exchanges),
        "figures": figures_by_key(rank_figures(report)),
    }


def by_rank(summaries: Sequence[TraceSummary]) -> list[JsonDict]:
    """Return one row per rank, summed over its traces (a repeating schedule writes several)."""
    rows: dict[int, JsonDict] = {}
    for summary in sorted(summaries, key=lambda summary: summary.rank):
        phases, totals = summary.phases, summary.totals
        on_device = bool(phases and phases.whole.on_device)
        row = rows.setdefault(summary.rank, {"rank": summary.rank, "on_device": on_device, **_empty_row()})
        row["traces"] += 1
        for name in ("tokens", "assignments", "calls"):
            row[name] += getattr(totals, name)
        if phases is not None:
            row["moe_work_us"] += phases.whole.moe_work_us or 0.0
            row["work_us"].update({layer.site: _work_us(layer, on_device) for layer in phases.layers})
    return list(rows.values())


def _empty_row() -> JsonDict:
    return {
        **dict.fromkeys(("traces", "tokens", "assignments", "calls", "moe_work_us"), 0),
        "work_us": Counter(),
    }


def _work_us(layer: LayerPhases, on_device: bool) -> float:
    return (layer.device_busy_us or 0.0) if on_device else layer.block_host_us - layer.host_gap_us


def ranks(summaries: Sequence[TraceSummary], report: RankReport | None = None) -> JsonDict:
    """Return tables and figures of at least two ranks; for one, only the number of ranks.

    Args:
        summaries: summaries of traces of one rank each.
        report: report of the same ranks together. Collectives also run while they wait for other ranks. That
            is not work, or the rank that waits longest would appear to be the straggler. If the wait cannot
            be subtracted (gloo waits in operators of the host), no straggler is named.
    """
    rows = by_rank(summaries)
    without_waits = _subtract_waits(rows, report)
    if len(rows) < 2:
        return {"ranks": len(rows), "figures": {}}
    waits_inside = bool(report is not None and report.exchanges) and not without_waits
    loads = [{r.info.site: tuple(r.assignments) for r in s.routers if sum(r.assignments)} for s in summaries]
    return {
        "ranks": len(rows),
        "same_load": all(load == loads[0] for load in loads),
        "straggler": None if waits_inside else _straggler(rows),
        "waits_inside": waits_inside,
        "without_waits": without_waits,
        "figures": figures_by_key(
            [load_per_rank(rows), work_per_rank(rows, without_waits), work_map(rows, without_waits)]
        ),
    }


def _subtract_waits(rows: Sequence[JsonDict], report: RankReport | None) -> bool:
    """Subtract the waits in the layers' kernels from the ranks' work; return whether all were known."""
    exchanges = report.exchanges if report is not None else ()
    if not exchanges or not all(
        exchange.on_device and exchange.wait_us is not None for exchange in exchanges
    ):
        return False
    by_number = {row["rank"]: row for row in rows}
    for exchange in exchanges:
        row = by_number.get(exchange.rank)
        if row is not None and exchange.site in row["work_us"]:
            row["work_us"][exchange.site] -= exchange.wait_us
            row["moe_work_us"] -= exchange.wait_us
    return True


def _straggler(rows: Sequence[JsonDict]) -> JsonDict | None:
    mean = sum(row["moe_work_us"] for row in rows) / len(rows)
    if not mean:
        return None
    slowest = max(rows, key=lambda row: row["moe_work_us"])
    return {
        "rank": slowest["rank"],
        "ratio": slowest["moe_work_us"] / mean,
        "excess_us": slowest["moe_work_us"] - mean,
    }


def load_per_rank(rows: Sequence[JsonDict]) -> Figure:
    """Plot the tokens that each rank's routers received."""
    tokens = [row["tokens"] for row in rows]
    return Figure(
        key="rank-load",
        title="Load per rank",
        caption="Tokens that each rank's routers saw, once for every router call.",
        data=[_bars(tokens, rows, "#0072B2", "tokens")],
        layout=bars_layout("tokens", 280),
        headings=("rank", "traces", "calls", "tokens", "÷ mean", "assignments"),
        rows=[
            (name, row["traces"], row["calls"], row["tokens"], ratio, row["assignments"])
            for name, row, ratio in zip(_names(rows), rows, _over_mean(tokens), strict=True)
        ],
    )


def work_per_rank(rows: Sequence[JsonDict], without_waits: bool = False) -> Figure:
    """Plot the MoE work of each rank."""
    work_us = [row["moe_work_us"] for row in rows]
    clock = "device busy" if all(row["on_device"] for row in rows) else "operator"
    return Figure(
        key="rank-work",
        title="MoE work per rank",
        caption=f"{clock.capitalize()} time of the MoE blocks, forward and backward, over the whole trace."
        + _waits_note(without_waits),
        data=[_bars(work_us, rows, "#009E73", "µs")] if sum(work_us) else [],
        layout=bars_layout("µs", 280),
        headings=("rank", "MoE work µs", "÷ mean"),
        rows=list(zip(_names(rows), work_us, _over_mean(work_us), strict=True)),
    )


def work_map(rows: Sequence[JsonDict], without_waits: bool = False) -> Figure:
    """Plot layers x ranks: each rank's work over the mean of the ranks."""
    sites = sorted({site for row in rows for site in row["work_us"]})
    work = np.array([[row["work_us"][site] for row in rows] for site in sites], float).reshape(-1, len(rows))
    mean = work.mean(1, keepdims=True)
    ratio = np.divide(work, mean, out=np.ones_like(work), where=mean > 0)
    hover = "layer %{y}, %{x}: %{z:.2f} of the mean rank's work"
    data, layout = layers_map(sites, _names(rows), ratio.round(4).tolist(), "÷ mean", hover)
    return Figure(
        key="rank-layers",
        title="Forward work of each layer, rank by rank",
        caption="Each rank's forward MoE work over the mean of all ranks; 1 is even."
        + _waits_note(without_waits),
        data=[data] if sites else [],
        layout=layout,
        headings=("layer", *(f"{name} µs" for name in _names(rows))),
        rows=[(site, *map(float, work[i])) for i, site in enumerate(sites)],
    )


def _names(rows: Sequence[JsonDict]) -> list[str]:
    return [f"rank {row['rank']}" for row in rows]


def _over_mean(values: Sequence[float]) -> list[float | None]:
    mean = sum(values) / len(values)
    return [value / mean if mean else None for value in values]


def _waits_note(without_waits: bool) -> str:
    return " Time spent waiting in collectives is left out." if without_waits else ""


def _bars(values: list[float], rows: Sequence[JsonDict], colour: str, unit: str) -> Spec:
    hover = f"%{{x}}: %{{y:,}} {unit}<extra></extra>"
    return bars(unit, _names(rows), values, colour, hover, showlegend=False)
