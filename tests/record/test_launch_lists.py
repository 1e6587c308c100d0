"""Tests of launch lists, taken from the compiler under a tracer: the part of a layer of each launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx, config, debug
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph

from compiled_models import compiled_anew
from models import tiny_olmoe
from moe_trace import MoETracer, find_routers
from moe_trace.data.compiled_graph import CompiledGraph, Place
from moe_trace.find.private import inductor
from moe_trace.find.private.inductor import listen_to_compiles, stop_listening
from moe_trace.find.private.launch_notes import GraphNode, LaunchNodes, LaunchNotes
from moe_trace.record.graphs.launch_lists import LaunchLists, _places_in_block, describe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing of earlier tests or processes: what a cache holds is not compiled, so nothing is noted."""
    torch._dynamo.reset()
    with compiled_anew():
        yield


class Blocks(nn.Module):
    """The MoE blocks of a model without its attention, which would take long to compile."""

    def __init__(self) -> None:
        super().__init__()
        model = tiny_olmoe(layers=2)
        model.set_experts_implementation("batched_mm")  # which breaks no graph, whatever the type and device
        self.layers = nn.ModuleList(layer.mlp for layer in model.model.layers)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


NAMES = ("layers.0.gate", "layers.1.gate")


def described(
    launches: Sequence[LaunchNodes], nodes: Sequence[GraphNode], places: Mapping[str, Mapping[str, Place]]
) -> CompiledGraph:
    return describe(LaunchNotes(tuple(launches), tuple(nodes), backward=False), places)


def places(graph: CompiledGraph) -> dict[tuple[str, ...], set[str]]:
    found: dict[tuple[str, ...], set[str]] = {}
    for launch in graph.launches:
        for part in (graph.parts[number] for number in launch.parts):
            found.setdefault(part.routers, set()).add(part.place)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_each_layers_parts_have_launches_of_their_own_forward_and_backward(device: str) -> None:
    before = GraphLowering.compile_to_module, config.trace.provenance_tracking_level
    model = Blocks().to(device)
    with MoETracer(model) as tracer:
        torch.compile(model)(torch.randn(2, 4, 32, device=device)).sum().backward()
    assert len(tracer.samples()) == 2
    forward, backward = tracer.recording().compiled_graphs
    assert (forward.backward, backward.backward) == (False, True)
    for name in NAMES:
        assert places(forward)[name,] >= {"router", "experts"}
        assert "experts" in places(backward)[name,]
    products = [one for one in forward.launches if one.product and one.parts]
    assert {forward.parts[one.parts[0]].place for one in products} == {"router", "experts"}
    assert (GraphLowering.compile_to_module, config.trace.provenance_tracking_level) == before


def test_a_backward_has_no_launches_of_another_models() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        torch._dynamo.reset()
        model = Blocks().to(dtype)
        with MoETracer(model) as tracer:
            torch.compile(model)(torch.randn(2, 4, 32, dtype=dtype)).sum().backward()
        found.append([len(graph.launches) for graph in tracer.recording().compiled_graphs])
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.cuda
def test_layers_that_share_code_are_named_together() -> None:
    model = Blocks().cuda()
    with MoETracer(model) as tracer, torch.no_grad():
        for layer in model.layers:
            layer.compile()
        model(torch.randn(2, 4, 32, device="cuda"))
    (graph,) = tracer.recording().compiled_graphs
    assert set(places(graph)) == {NAMES}


def test_parts_that_are_no_modules_of_the_model_are_not_told() -> None:
    site = find_routers(Blocks())[0]
    elsewhere = replace(site, router=nn.Linear(1, 1))  # as where layers share one
    assert _places_in_block(elsewhere) == {site.name: "router"}
    assert _places_in_block(replace(elsewhere, experts=nn.Identity())) == {}


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_a_layer_that_is_not_recorded_has_no_list() -> None:
    model = Blocks()
    with MoETracer(model, layers=[0]) as tracer, torch.no_grad():
        for layer in model.layers:
            layer.compile()
        model(torch.randn(2, 4, 32))
    assert [{*places(graph)} for graph in tracer.recording().compiled_graphs] == [{NAMES[:1]}]


@pytest.mark.parametrize(
    "path",
    ["L['self'].layers.0.gate", "G['m']._modules['layers']._modules['0'].gate", "L['x'].layers.0.gate"],
)
def test_a_path_is_read_however_torch_writes_it(path: str) -> None:
    launches = [LaunchNodes("extern_kernels.mm", ("mm",))]
    modules = {f"layers.{i}.gate": {f"layers.{i}.gate": "router"} for i in (0, 1)}
    graph = described(launches, [GraphNode("mm", "aten.mm.default", (path,))], modules)
    assert [part.routers for part in graph.parts] == [("layers.0.gate",)]


def test_what_the_tracer_writes_is_no_part_of_the_layer() -> None:
    nodes = [
        GraphNode("mm", "aten.mm.default", ("L['self'].gate",)),
        GraphNode("put", "aten.index_put_.default", ("L['self'].gate",), ours=True),
    ]
    launches = [LaunchNodes("extern_kernels.mm", ("mm",)), LaunchNodes("triton_poi_0", ("put",))]
    graph = described(launches, nodes, {"model.gate": {"model.gate": "router"}})
    assert [launch.parts for launch in graph.launches] == [(0,), ()]


def test_a_fused_kernel_is_for_what_no_other_computes() -> None:
    nodes = [
        GraphNode("norm", "aten.mul.Tensor", ("L['self'].norm",)),
        GraphNode("gather", "aten.index.Tensor", ("L['self'].mlp.experts",)),
        GraphNode("view", "aten.reshape.default", ("L['self'].mlp.gate",)),
        GraphNode("softmax", "aten._softmax.default", ("L['self'].mlp.gate",)),
    ]
    launches = [
        LaunchNodes("triton_red_0", ("norm",)),
        LaunchNodes("triton_poi_1", ("gather", "norm", "view")),
        LaunchNodes("triton_poi_2", ("gather", "softmax")),
    ]
    modules = {"mlp.gate": {"mlp": "block", "mlp.experts": "experts", "mlp.gate": "router"}}
    graph = described(launches[:2], nodes, modules)
    assert [[graph.parts[n].place for n in one.parts] for one in graph.launches] == [[], ["experts"]]
    assert graph.launches[1].gather and not graph.launches[1].outside
    graph = described([launches[2], LaunchNodes("triton_poi_3", ("norm", "softmax"))], nodes, modules)
    assert [(len(one.parts), one.outside) for one in graph.launches] == [(1, False), (0, False)]
    alone = described([LaunchNodes("triton_poi_4", ("norm", "gather", "softmax"))], nodes, modules)
    assert (len(alone.launches[0].parts), alone.launches[0].outside) == (2, True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_view_that_is_called_runs_no_kernel_but_a_cpu_shows_its_call(device: str) -> None:
    graph = torch.fx.Graph()
    pair = graph.placeholder("pair")
    view = graph.call_function(torch.ops.aten.view_as_complex.default, (pair,))
    product = graph.call_function(torch.ops.aten.mul.Tensor, (view, view))
    for node in (pair, view, product):
        node.meta["val"] = torch.empty(2, device=device)
    idle = [inductor._is_idle(node) for node in (pair, view, product)]
    assert idle == [False, device != "cpu", False]


def notes_of_compiled(function: Callable[..., object], *inputs: torch.Tensor) -> list[LaunchNotes]:
    """What is told while a function is compiled."""
    found: list[LaunchNotes] = []
    assert listen_to_compiles(found.append)
    try:
        with torch.no_grad():
            torch.compile(function, fullgraph=True)(*inputs)
    finally:
        stop_listening(found.append)
    return found


def test_libraries_calls_that_the_compiler_leaves_out_are_told_with_what_they_compute() -> None:
    def writes(x: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        added = (x @ x).index_add(0, rows, x.cos())  # in place: the product is not the write
        masked = (added @ x).index_put((mask,), x[0])  # a fallback, as of every mask but with one value
        return torch.ones_like(x).scatter_reduce(0, rows[:, None].expand(4, 4), masked @ x, "prod") @ x

    x = torch.randn(4, 4)
    [notes] = notes_of_compiled(writes, x, torch.tensor([True, False] * 2), torch.arange(4))
    assert notes.problem == ""
    operators = {node.name: node.target for node in notes.nodes}
    calls = [(one.kernel, *map(operators.get, one.nodes)) for one in notes.launches if "." in one.kernel]
    product, masked, reduced = (
        ("extern_kernels.mm", "aten.mm.default"),
        ("aten.index_put_", "aten.index_put_.default"),
        ("aten.scatter_reduce_.two", "aten.scatter_reduce.two"),
    )
    assert calls == [product, product, masked, product, reduced, product]


def branching(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: (x @ x) @ x, (x,))


region = torch.compiler.nested_compile_region(lambda x: (x @ x).relu())


@pytest.mark.parametrize(
    ("function", "reason"),
    [(branching, "torch.cond"), (lambda x: region(region(x)), "nested_compile_region")],
)
def test_what_the_compiler_noted_once_for_several_runs_is_refused_with_its_reason(
    function: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    [notes] = notes_of_compiled(function, torch.randn(4, 4))
    assert reason in notes.problem
    graph = describe(replace(notes, nodes=(*notes.nodes, GATE)), {"gate": {"gate": "router"}})
    assert (graph.launches, graph.problem) == ((), notes.problem)
    assert [part.routers for part in graph.parts] == [("gate",)]


GATE = GraphNode("its", "aten.mm.default", ("L['self'].gate",))


def test_a_listener_that_raises_is_said_and_costs_nobody_their_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("no such node")

    monkeypatch.setattr(inductor, "_said", [])
    assert listen_to_compiles(broken)
    try:
        with pytest.warns(RuntimeWarning, match=r"could not be read \(LookupError: no such node\)") as said:
            for size in (3, 4):
                torch._dynamo.reset()
                assert torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(size)).shape == (size,)
        assert sum("could not be read" in str(one.message) for one in said) == 1
    finally:
        stop_listening(broken)


def test_tracers_listen_until_the_last_has_stopped() -> None:
    before = GraphLowering.compile_to_module
    model = tiny_olmoe(layers=1)
    lists = [LaunchLists(find_routers(model)) for _ in range(2)]
    for one in lists:
        one.watch()
        one.watch()
    lists[1].stop()
    assert GraphLowering.compile_to_module is not before
    lists[0].stop()
    lists[0].stop()
    assert GraphLowering.compile_to_module is before


def test_a_torch_without_the_name_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GraphLowering, "compile_to_module")
    assert not listen_to_compiles(print)
    lists = LaunchLists(find_routers(tiny_olmoe(layers=1)))
    lists.watch()
    lists.stop()
    assert lists.graphs() == ()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (compile_fx, "compile_fx"),
        (CompiledFxGraph, "after_deserialization"),
        (debug, "create_kernel_information_json"),
    ],
)
def test_a_torch_without_another_name_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    """Without the first two, code from the cache has no notes; without the third, there are none at all."""
    monkeypatch.delattr(owner, name)
    before = vars(GraphLowering).copy(), vars(CompiledFxGraph).copy(), vars(compile_fx).copy()
    assert listen_to_compiles(print) is (owner is not debug)
    stop_listening(print)
    assert (vars(GraphLowering), vars(CompiledFxGraph), vars(compile_fx)) == before
