"""The routers of a model as text: a row per group of equal routers, and a legend."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from moe_trace.data.display.columns import Cell, count_column, text_table
from moe_trace.data.display.json import json_text
from moe_trace.data.display.tables import WIDTH, number_ranges, printable
from moe_trace.data.schema import RouterInfo

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a path component that is a number


def render_routers_json(model: str, routers: Sequence[RouterInfo]) -> str:
    """Return all properties of each router as indented JSON."""
    return json_text({"model": {"class": model}, "routers": routers})


def render_routers(model: str, routers: Sequence[RouterInfo], contracts: dict[str, str]) -> str:
    """Render text of 80 columns.

    Args:
        model: class of the model.
        contracts: mapping from contract to a one-line description of the interface of router and experts.
    """
    groups = group_routers(routers)
    names = [chr(ord("A") + i) if i < 26 else f"Z{i}" for i in range(len(groups))]
    plural = "router" if len(routers) == 1 else "routers"
    parts = [f"{printable(model)}: {len(routers)} {plural}", _table(names, groups)]
    parts += [_legend(name, group) for name, group in zip(names, groups, strict=True)]
    used = dict.fromkeys(router.contract for router in routers)
    parts.append("Adapters\n" + "\n".join(_entry("", f"{name}: {contracts.get(name, '')}") for name in used))
    return "\n\n".join(parts) + "\n"


def group_routers(routers: Sequence[RouterInfo]) -> list[list[RouterInfo]]:
    """Group routers that differ only in their layer, in the order in which they were found."""
    groups: dict[object, list[RouterInfo]] = {}
    for router in routers:
        facts = {key: value for key, value in asdict(router).items() if key not in ("site", "name", "layer")}
        groups.setdefault((_NUMBER.sub("#", router.name), repr(facts)), []).append(router)
    return list(groups.values())


def _table(names: Sequence[str], groups: Sequence[Sequence[RouterInfo]]) -> str:
    """Render two lines per group: parameters of one router and its experts, and FLOPs per token."""
    rows: list[tuple[Cell, ...]] = []
    for name, group in zip(names, groups, strict=True):
        info = group[0]
        size = (name, runs([router.layer for router in group]), str(info.num_experts), info.top_k or None)
        rows += _size_rows(size, [info])
    everything = [router for group in groups for router in group]
    if len(everything) > 1:
        # FLOPs are not summed: image tokens never reach the experts for text.
        rows.append(_size_rows(("all", "", "", ""), everything)[0])
    sizes = [count_column(part) for part in ("router", "experts", "shared experts")]
    return text_table(("", "layers", "E", "k", "", *sizes), rows, left=2)


def _size_rows(first: tuple[Cell, ...], routers: Sequence[RouterInfo]) -> list[tuple[Cell, ...]]:
    parameters = [sum(r.parameters.get(part, 0) for r in routers) for part in ("router", "experts", "shared")]
    flops = [
        sum(router.router_flops_per_token for router in routers),
        sum(map(expert_flops_per_token, routers)),
        sum(router.shared_flops_per_token for router in routers),
    ]
    return [
        (*first, "parameters", *(value or None for value in parameters)),
        ("", "", "", "", "FLOP/token", *(value or None for value in flops)),
    ]


def expert_flops_per_token(info: RouterInfo) -> int:
    """Return the FLOPs of the routed experts for a token whose slots all go to experts that compute."""
    slots = info.num_experts if info.every_expert_computes else info.top_k
    return info.expert_flops_per_slot * slots


def _legend(name: str, group: Sequence[RouterInfo]) -> str:
    info = group[0]
    labels = group[0].site if len(group) == 1 else f"{group[0].site} … {group[-1].site}"
    lines = [
        _entry(
            name, f"{labels}: {info.router_class} -> {info.experts_class or 'no module'}, {info.contract}"
        ),
        _entry("", compact_path([router.name for router in group])),
    ]
    return "\n".join([*lines, *(_entry("", note) for note in info.notes)])


def _entry(label: str, text: str) -> str:
    return textwrap.fill(
        printable(text, 2000),
        WIDTH,
        initial_indent=label.ljust(3),
        subsequent_indent="   ",
        break_on_hyphens=False,
    )


def compact_path(paths: Sequence[str]) -> str:
    """Return `model.layers.{0-31}.mlp.gate` for paths that differ in one number, else the first and last."""
    numbers = [[int(number) for number in _NUMBER.findall(path)] for path in paths]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if not varying:
        return paths[0]
    if len(varying) > 1:
        return f"{paths[0]} … {paths[-1]}"
    where = list(_NUMBER.finditer(paths[0]))[varying[0]]
    span = runs([row[varying[0]] for row in numbers])
    return f"{paths[0][: where.start()]}{{{span}}}{paths[0][where.end() :]}"


def runs(numbers: Sequence[int]) -> str:
    """Return `0-2,5,7-9`, or `1-47 step 2` for an even spacing."""
    ordered = sorted(set(numbers))
    steps = {b - a for a, b in itertools.pairwise(ordered)}
    if len(ordered) > 2 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}-{ordered[-1]} step {steps.pop()}"
    return ",".join(number_ranges(ordered))
