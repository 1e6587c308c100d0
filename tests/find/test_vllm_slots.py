"""Tests of the structure of vLLM's load balancer (EPLB): counts are per expert, whatever slots hold it.

vLLM's own EPLB needs expert parallelism on GPUs and is not run here. The runner here maps ids as
`_apply_eplb_mapping` of its routers does, and the balancer moves experts between forwards, in place, as
`_commit_eplb_maps` does.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_trace
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.errors import TraceFileError
from moe_trace.find.contracts.engines.physical_experts import experts_of_slots, logical_ids, slots_of_call

DIM, EXPERTS, SLOTS, TOP_K = 8, 6, 9, 2


class State:
    """`EplbLayerState`: a slot for each expert, and replicas of some in those that are left."""

    def __init__(self) -> None:
        self.logical_to_physical_map = torch.full((EXPERTS, SLOTS - EXPERTS + 1), -1)
        self.logical_replica_count = torch.zeros(EXPERTS, dtype=torch.int64)
        self.move()

    def move(self) -> None:
        held = torch.cat([torch.arange(EXPERTS), torch.randint(EXPERTS, (SLOTS - EXPERTS,))])
        self.held = held[torch.randperm(SLOTS)]
        self.logical_to_physical_map.fill_(-1)
        for expert in range(EXPERTS):
            slots = (self.held == expert).nonzero().flatten()
            self.logical_to_physical_map[expert, : len(slots)] = slots
            self.logical_replica_count[expert] = len(slots)


class Router:
    def __init__(self) -> None:
        self.state = State()
        self.begun = True
        self.logical: list[Tensor] = []
        self.physical: list[Tensor] = []
        self.held: list[list[int]] = []

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.softmax(-1).topk(TOP_K, dim=-1)
        state, token = self.state, torch.arange(len(ids)).unsqueeze(-1)
        physical = state.logical_to_physical_map[ids, token % state.logical_replica_count[ids]]
        self.logical.append(ids)
        self.physical.append(physical)
        self.held.append(state.held.tolist())
        return weights, (physical if self.begun else ids).to(torch.int32)


class CompilableRouter(Router):
    """Keeps what it decides in buffers, which compiled code can write."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2, 900, TOP_K, dtype=torch.int64)

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.softmax(-1).topk(TOP_K, dim=-1)
        state, token = self.state, torch.arange(len(ids), device=ids.device).unsqueeze(-1)
        physical = state.logical_to_physical_map[ids, token % state.logical_replica_count[ids]]
        self.kept[:, : len(ids)].copy_(torch.stack([ids, physical]))
        return weights, physical.to(torch.int32)

    def take(self, tokens: int) -> None:
        logical, physical = self.kept[:, :tokens].cpu().clone()
        self.logical.append(logical)
        self.physical.append(physical)
        self.held.append(self.state.held.tolist())


class RoutedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(SLOTS, 2 * DIM, DIM))
        self.w2_weight = nn.Parameter(torch.randn(SLOTS, DIM, DIM))

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return x * topk_weights.sum(-1, keepdim=True)


class Runner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.routed_experts = Router(), RoutedExperts()
        self.moe_config = SimpleNamespace(
            num_experts=SLOTS, num_logical_experts=EXPERTS, experts_per_token=TOP_K
        )
        self.is_monolithic = False

    @property
    def eplb_state(self) -> Any:
        return self.router.state if self.router.begun else SimpleNamespace(logical_to_physical_map=None)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        weights, ids = self.router.select_experts(hidden_states=hidden_states, router_logits=router_logits)
        return self.routed_experts.forward_modular(x=hidden_states, topk_weights=weights, topk_ids=ids)


class Block(nn.Module):
    """As GPT-OSS's, whose gate is named router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(DIM, EXPERTS), Runner()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(hidden_states=x, router_logits=self.router(x))


def counts(ids: list[Tensor], size: int) -> list[list[int]]:
    return [torch.bincount(one.flatten(), minlength=size).tolist() for one in ids]


@pytest.mark.parametrize("tokens", [5, 900], ids=["waits", "reduced_at_once"])
def test_counts_are_of_experts_though_the_balancer_moves_them(tokens: int) -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    model, router = nn.Sequential(block), block.experts.router
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for _ in range(40):  # more than are taken apart together
            model(torch.randn(tokens, DIM))
            router.state.move()
    found = [sample.assignments.tolist() for sample in tracer.samples()]
    assert found == counts(router.logical, EXPERTS) and not tracer.recording().lost.calls
    assert found != [row[:EXPERTS] for row in counts(router.physical, SLOTS)], "slots are others"
    (site,) = tracer.sites
    assert site.name == "0.router" and site.info.num_experts == EXPERTS
    assert site.info.expert_flops_per_slot == 2 * 3 * DIM * DIM
    assert f"{EXPERTS} experts on {SLOTS} physical slots" in " ".join(site.info.notes)
    assert all(sample.router_entropy is not None for sample in tracer.samples())


@pytest.mark.parametrize("tokens", [5, 900], ids=["waits", "reduced_at_once"])
def test_what_each_slot_got_and_held_is_in_the_recording_and_its_file(tokens: int) -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    model, router = nn.Sequential(block), block.experts.router
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for step in range(40):
            model(torch.randn(tokens, DIM))
            if step % 8 == 7:
                router.state.move()
    written = encode_recording(tracer.recording())
    for samples in (tracer.samples(), decode_recording(json.loads(written)).samples):
        assert [s.slot_assignments.tolist() for s in samples] == counts(router.physical, SLOTS)
        assert [s.slot_experts.tolist() for s in samples] == router.held
        for sample in samples:
            added_up = np.bincount(sample.slot_experts, sample.slot_assignments, EXPERTS)
            assert added_up.tolist() == sample.assignments.tolist()
    maps = json.loads(written)["samples"]["slot_experts"]
    assert [len(row) for row in maps] == [SLOTS, *[0] * 7] * 5, "written where it changes"
    assert tracer.recording().routers[0].num_slots == SLOTS


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot_experts": [[0] * SLOTS]},
        {"slot_experts": [[EXPERTS] * SLOTS] * 2},
        {"slot_experts": [[0], [0]]},
    ],
    ids=["too_few", "no_expert", "too_short"],
)
def test_maps_that_are_none_of_the_router_are_refused(wrong: dict[str, Any]) -> None:
    model = nn.Sequential(Block().eval())
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for _ in range(2):
            model(torch.randn(5, DIM))
    payload = json.loads(encode_recording(tracer.recording()))
    assert len(decode_recording(payload).samples) == 2
    payload["samples"] |= wrong
    with pytest.raises(TraceFileError):
        decode_recording(payload)


def test_a_slot_of_weight_zero_or_out_of_use_counts_nowhere() -> None:
    ids, weights = torch.tensor([[0, 3], [1, -1], [0, 2]]), torch.tensor([[1.0, 1], [0, 1], [1, 1]])
    slots = slots_of_call(ids, weights, experts_of_slots(torch.tensor([[0, 2], [1, -1]]), 4))
    assert slots.tolist() == [2, 0, 1, 0, *[0, 1, 0, -1]]


def test_compiled_code_counts_slots_too_by_the_map_of_each_call() -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    block.experts.router = CompilableRouter()
    model, router = nn.Sequential(block), block.experts.router
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        for tokens in (3, 40, 900, 3, 40, 900):
            compiled(torch.randn(tokens, DIM))
            router.take(tokens)
            router.state.move()
    samples = tracer.samples()
    assert all(sample.in_graph for sample in samples)
    assert [s.assignments.tolist() for s in samples] == counts(router.logical, EXPERTS)
    assert [s.slot_assignments.tolist() for s in samples] == counts(router.physical, SLOTS)
    assert [s.slot_experts.tolist() for s in samples] == router.held


def test_ids_are_left_as_they_are_until_the_balancer_begins() -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    model, router = nn.Sequential(block), block.experts.router
    router.begun = False
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(torch.randn(5, DIM))
        router.begun = True
        model(torch.randn(5, DIM))
    assert [s.assignments.tolist() for s in tracer.samples()] == counts(router.logical, EXPERTS)


@pytest.mark.cuda
def test_a_captured_graph_reads_the_map_of_its_replay() -> None:
    """A CUDA graph is captured once and replayed after the balancer moved: the map is read on the device."""
    torch.manual_seed(0)
    state = State()
    slots = state.logical_to_physical_map.cuda()
    ids = torch.arange(SLOTS).cuda().unsqueeze(-1)
    logical_ids(ids, experts_of_slots(slots, SLOTS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = logical_ids(ids, experts_of_slots(slots, SLOTS))
    for _ in range(3):
        state.move()
        slots.copy_(state.logical_to_physical_map)
        graph.replay()
        assert found.flatten().tolist() == state.held.tolist()


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [3, 40, 900], ids=["small", "medium", "reduced"])
def test_replays_of_a_captured_graph_count_slots_by_the_map_of_each(tokens: int) -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    router = block.experts.router = CompilableRouter()
    model, router.kept = nn.Sequential(block).cuda(), router.kept.cuda()
    for name in ("logical_to_physical_map", "logical_replica_count"):
        setattr(router.state, name, getattr(router.state, name).cuda())
    x, replays = torch.randn(tokens, DIM, device="cuda"), 5
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(x)  # warms up, eagerly
        router.take(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        for _ in range(replays):
            router.state.move()
            x.normal_()
            graph.replay()
            torch.cuda.synchronize()
            router.take(tokens)
        samples = tracer.samples()
    assert [sample.in_graph for sample in samples] == [False, *[True] * replays]
    assert [s.assignments.tolist() for s in samples] == counts(router.logical, EXPERTS)
    assert [s.slot_assignments.tolist() for s in samples] == counts(router.physical, SLOTS)
    assert [s.slot_experts.tolist() for s in samples] == router.held
