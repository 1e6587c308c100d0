"""Tests of routes, token by token, against what the experts really computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moe_trace
from families.configs import FAMILIES
from families.family import Family, use_experts
from families.oracle import Intervention, Truth
from moe_trace.data.routes.columns import RecordedRoutes
from traced_families import HONEST, named

OF_THE_ISSUE = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "jetmoe")


def sums(tracer: moe_trace.MoETracer, phase: str = "forward") -> dict[str, list[int]]:
    """Assignments by router, from the samples."""
    found: dict[str, Any] = {}
    for sample in tracer.samples():
        if sample.phase == phase:
            found[sample.name] = found.get(sample.name, 0) + np.asarray(sample.assignments)
    return {name: counts.tolist() for name, counts in found.items()}


def counts(routes: RecordedRoutes) -> dict[str, list[int]]:
    """The same from the routes."""
    return {
        name: assigned[:experts].tolist()
        for group in routes.groups
        for name, assigned, experts in zip(group.layers, group.assignments(), group.num_experts, strict=True)
    }


def pairs_of(routes: RecordedRoutes, truth: Truth, identities: dict[str, int]) -> list[set[tuple[int, int]]]:
    """(token, expert) of each forward in which a router was called."""
    for group in routes.groups:
        for layer, name in enumerate(group.layers):
            if name in (truth.router_path, f"{truth.router_path}.router_gate"):
                real = group.num_experts[layer] - identities[name]
                found = []
                for forward in np.unique(group.forward):
                    rows = group.forward == forward
                    ids_TK = group.expert_ids[rows, layer]
                    found.append({(t, int(e)) for t, ids in enumerate(ids_TK) for e in ids if e < real})
                return found
    raise AssertionError(f"{truth.router_path} is in no group")


def assert_true(family: Family, model: Any) -> RecordedRoutes:
    tracer = moe_trace.MoETracer(model, routes=True)
    with Intervention(model) as watch, tracer:
        family.run(model)
    routes = tracer.routes()
    identities = {site.name: site.info.identity_experts for site in tracer.sites}
    by_router: dict[str, list[Truth]] = {}
    for truth in watch.truths():
        by_router.setdefault(truth.router_path, []).append(truth)
    for truths in by_router.values():
        found = pairs_of(routes, truths[0], identities)
        if len(truths) == len(found):
            assert [set(truth.pairs) for truth in truths] == found
        else:  # called several times in the forward: rows in the order of the calls
            starts = np.cumsum([0, *(truth.tokens for truth in truths)]).tolist()
            shifted = [
                {(token + start, expert) for token, expert in truth.pairs}
                for truth, start in zip(truths, starts, strict=False)
            ]
            assert set().union(*shifted) == set().union(*found)
    assert counts(routes) == sums(tracer)
    assert routes.dropped == {}
    return routes


@named(HONEST)
def test_ids_are_what_the_experts_computed_in_every_family(family: Family) -> None:
    assert_true(family, family.build())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", OF_THE_ISSUE)
def test_ids_are_what_the_experts_computed_in_every_implementation(name: str, implementation: str) -> None:
    family = next(family for family in FAMILIES if family.name == f"{name}/text")
    model = family.build()
    if use_experts(model, implementation):
        assert_true(family, model)
