"""Tests that compiled code from Inductor's caches on disk has its launches, with those of its own modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch.profiler import ProfilerActivity

from models import tiny_olmoe
from moe_trace import MoETracer
from moe_trace.data.compiled_graph import encode_compiled
from moe_trace.data.schema import Recording
from moe_trace.data.summary_notes import notes_of
from moe_trace.find.private import launch_notes
from moe_trace.find.private.inductor import _origins_of
from moe_trace.find.private.launch_notes import (
    GraphNode,
    LaunchNodes,
    LaunchNotes,
    Origins,
    decode_notes,
    encode_notes,
)
from moe_trace.timeline.correlate.compiled_calls import CALL, key_of


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with config.patch(force_disable_caches=False):
        yield


class Blocks(nn.Module):
    """The MoE blocks of a model without its attention, which would take long to compile."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        model = tiny_olmoe(layers=layers)
        model.set_experts_implementation("batched_mm")
        self.layers = nn.ModuleList(layer.mlp for layer in model.model.layers)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def trained() -> tuple[Recording, dict[str, int]]:
    """A forward and a backward, compiled as in a new process; what the caches did."""
    torch._dynamo.reset()
    counters.clear()
    model = Blocks(1)
    with MoETracer(model) as tracer, torch.profiler.profile(activities=[ProfilerActivity.CPU]) as prof:
        torch.compile(model)(torch.randn(2, 4, 32)).sum().backward()
    shown = [key_of(event.name) for event in prof.events() if event.name.startswith(CALL)]
    assert [graph.key for graph in tracer.recording().compiled_graphs] in ([], shown) and all(shown)
    done = {**counters["inductor"], **counters["aot_autograd"]}
    return tracer.recording(), {name: count for name, count in done.items() if "cache" in name}


def print_trained() -> None:
    """For a process of its own."""
    warnings.simplefilter("ignore")
    recording, done = trained()
    print(json.dumps([encode_compiled(recording.compiled_graphs), done]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_from_the_caches_has_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, (here, here.parent)), *sys.path])}
    code = "import test_cached_launches as test; test.print_trained()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled, first = json.loads(done.stdout)
    assert [graph["backward"] for graph in compiled["graphs"]] == [False, True]
    assert (first["fxgraph_cache_miss"], first["autograd_cache_miss"]) == (2, 1)

    recording, second = trained()
    assert encode_compiled(recording.compiled_graphs) == compiled
    assert (second["fxgraph_cache_hit"], second["autograd_cache_hit"]) == (2, 1)

    with functorch_config.patch(enable_autograd_cache=False):
        recording, third = trained()
    assert encode_compiled(recording.compiled_graphs) == compiled
    assert third == {"fxgraph_cache_hit": 2}

    monkeypatch.setattr(launch_notes, "_VERSION", 0)  # as if another version had compiled it, or no tracer
    recording, fourth = trained()
    assert recording.compiled_graphs == () and fourth["fxgraph_cache_hit"] == 2
    assert any("TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in note for note in notes_of(recording))


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_layers_that_are_compiled_to_one_code_have_launches_of_their_own() -> None:
    """The second is the first's code, from the cache, though it was traced in another module."""
    model = Blocks(2)
    functions: list[Callable[[torch.Tensor], Any]] = [
        lambda hidden: model.layers[0](hidden) * 2,
        lambda hidden: model.layers[1](hidden) * 2,
    ]
    counters.clear()
    with MoETracer(model) as tracer:
        for function in functions:
            torch.compile(function)(torch.ones(2, 4, 32))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    first, second = tracer.recording().compiled_graphs
    assert {part.routers for part in first.parts} == {("layers.0.gate",)}
    assert {part.routers for part in second.parts} == {("layers.1.gate",)}
    assert first.launches == second.launches


GATE, EXPERTS, OTHER = (("L['self'].mlp", f"L['self'].mlp.{name}") for name in ("gate", "experts", "other"))
NOTES = LaunchNotes(
    (LaunchNodes("cpp_fused_0", ("mm", "topk")), LaunchNodes("extern_kernels.bmm", ("bmm",))),
    (
        GraphNode("mm", "aten.mm.default", GATE),
        GraphNode("topk", "aten.topk.default", GATE, ours=True),
        GraphNode("bmm", "aten.bmm.default", EXPERTS),
    ),
    backward=True,
)
ORIGINS = Origins("0f", (((), False), (GATE, False), (GATE, True), (EXPERTS, False)))


def test_graphs_compute_the_same_only_if_each_operator_and_argument_is_the_same() -> None:
    alike: list[Callable[..., Any]] = [
        lambda x, y: torch.mul(x, y) + 2,
        lambda first, z: torch.mul(first, z) + 2,
    ]
    others: list[Callable[..., Any]] = [
        lambda x, y: torch.mul(y, x) + 2,
        lambda x, y: torch.mul(x, y) + 3,
        lambda x, y: torch.div(x, y) + 2,
        lambda x, y: torch.mul(x, y) - 2,
    ]
    first, second, *found = (_origins_of(torch.fx.symbolic_trace(one)).computes for one in alike + others)
    assert first == second and len({first, *found}) == 5


def test_notes_are_those_that_were_kept() -> None:
    kept = encode_notes(NOTES, ORIGINS)
    assert decode_notes(kept, ORIGINS) == NOTES


def test_modules_of_another_name_take_the_place_of_those_that_were_compiled() -> None:
    kept = encode_notes(NOTES, ORIGINS)
    swapped = Origins("0f", (((), False), (EXPERTS, False), (EXPERTS, True), (GATE, False)))
    found = decode_notes(kept, swapped)
    assert found is not None and [node.modules for node in found.nodes] == [EXPERTS, EXPERTS, GATE]


@pytest.mark.parametrize(
    "origins",
    [
        Origins("1f", ORIGINS.nodes),
        Origins("0f", ORIGINS.nodes[:-1]),
        Origins("0f", (((), False), (GATE, False), (OTHER, True), (EXPERTS, False))),
        Origins("0f", (((), False), (GATE, False), (GATE, False), (EXPERTS, False))),
        Origins("0f", ((OTHER, False), *ORIGINS.nodes[1:])),
    ],
    ids=[
        "computes another thing",
        "has fewer nodes",
        "one module was two",
        "ours was not",
        "without modules",
    ],
)
def test_another_graph_has_no_notes_of_this_one(origins: Origins) -> None:
    assert decode_notes(encode_notes(NOTES, ORIGINS), origins) is None


def test_a_module_that_was_not_traced_is_not_guessed() -> None:
    kept = encode_notes(NOTES, Origins("0f", ORIGINS.nodes[:3]))
    assert decode_notes(kept, Origins("0f", ORIGINS.nodes[:3])) is None


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "{}",
        b"",
        b"\x00" * 9,
        *(zlib.compress(json.dumps(value).encode()) for value in ([], {}, {"version": 2}, {"version": 1})),
        zlib.compress(b"[" * 100_000),
        *((encode_notes(NOTES, ORIGINS) or b"")[:cut] for cut in (20, -20)),
    ],
    ids=lambda kept: f"{len(kept)} long" if kept else repr(kept),
)
def test_what_is_broken_or_foreign_is_no_notes(kept: object) -> None:
    assert decode_notes(kept, ORIGINS) is None


def test_notes_beyond_the_bound_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_notes, "_BYTES_MAX", 50)
    assert encode_notes(NOTES, ORIGINS) is None
