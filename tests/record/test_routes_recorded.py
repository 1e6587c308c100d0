"""Tests of the token of each row of routes, and of which rows are kept, against the experts' arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, StaticCache

import moe_trace
from hand_written import DIM, NanoMoE
from models import ExpertsCall, tiny_olmoe, token_batch, watch_experts
from moe_trace import RecordedRoutes, Routes
from moe_trace.data.errors import UsageError

LAYERS = 3


def record(
    model: Any, run: Callable[[], Any], routes: Any = True, **options: Any
) -> tuple[RecordedRoutes, list[ExpertsCall], moe_trace.MoETracer]:
    with (
        torch.no_grad(),
        watch_experts(model) as calls,
        moe_trace.MoETracer(model, routes=routes, **options) as tracer,
    ):
        run()
    return tracer.routes(), calls, tracer


def received(calls: list[ExpertsCall]) -> np.ndarray:
    """[T, L, K], rows in the order of the calls."""
    return np.stack(
        [np.concatenate([c.index for c in calls if c.layer == layer]) for layer in range(LAYERS)], 1
    )


def assert_same_as_samples(
    routes: RecordedRoutes, tracer: moe_trace.MoETracer, phase: str = "forward"
) -> None:
    total = np.zeros((LAYERS, 8), int)
    for sample in tracer.samples():
        if sample.phase == phase:
            total[sample.layer] += sample.assignments
    assert routes.assignments().tolist() == total.tolist()


def test_each_token_of_a_padded_generation_has_its_sequence_position_and_stage() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 5)
    batch["attention_mask"][1, :2] = 0
    routes, calls, tracer = record(model, lambda: model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert (routes.expert_ids == received(calls)).all()
    assert routes.sequence.tolist() == [0] * 5 + [1] * 5 + [0, 1] * 2
    assert routes.position.tolist() == [0, 1, 2, 3, 4, -1, -1, 0, 1, 2, 5, 3, 6, 4]
    assert routes.padding.tolist() == [False] * 5 + [True, True] + [False] * 7
    assert routes.stage.tolist() == ["prefill"] * 10 + ["decode"] * 4
    assert routes.step.tolist() == routes.forward.tolist() == [0] * 10 + [1] * 2 + [2] * 2
    assert routes.lost_layers is routes.recomputed is routes.weights is routes.token_ids is None
    assert_same_as_samples(routes, tracer)


def test_weights_and_token_ids_are_kept_where_they_are_asked_for() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 5)
    options = Routes(weights=True, token_ids=True)
    routes, calls, _ = record(model, lambda: model(**batch), options)
    assert routes.token_ids is not None and routes.weights is not None
    assert routes.token_ids.tolist() == batch["input_ids"].flatten().tolist()
    for layer, call in enumerate(calls):
        assert (routes.weights[:, layer] == call.weights.astype(np.float16)).all()


def test_what_the_caller_writes_to_its_arguments_afterwards_changes_nothing() -> None:
    model, batch = tiny_olmoe(), token_batch(1, 4)
    positions = torch.arange(4)[None]

    def run() -> None:
        for _ in range(2):
            model(**batch, position_ids=positions)
            batch["input_ids"] += 1
            positions.add_(4)

    routes, _, _ = record(model, run, Routes(token_ids=True))
    first = (batch["input_ids"] - 2).flatten().tolist()
    assert routes.token_ids is not None
    assert routes.token_ids.tolist() == first + [one + 1 for one in first]
    assert routes.position.tolist() == list(range(8))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_are_rows_of_the_batch(cache: str) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 4)
    options = {"num_beams": 2, "cache_implementation": cache, "disable_compile": True}
    routes, calls, _ = record(
        model, lambda: model.generate(**batch, max_new_tokens=3, do_sample=False, **options)
    )
    assert (routes.expert_ids == received(calls)).all()
    decoded = routes.stage == "decode"
    assert routes.sequence[decoded].tolist() == [0, 1, 2, 3] * 2
    assert routes.position[decoded].tolist() == [4] * 4 + [5] * 4


def test_packed_sequences_are_numbered_and_begin_at_position_0() -> None:
    model = tiny_olmoe()
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=False)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [4, 4, 4, 4]}])
    batch.pop("labels")
    routes, _, _ = record(model, lambda: model(**batch))
    assert routes.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert routes.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("positions", [True, False])
def test_packed_sequences_by_their_cumulative_lengths(positions: bool) -> None:
    model = tiny_olmoe()
    ids = torch.arange(3, 12)[None]
    given: dict[str, Tensor] = {"cu_seq_lens_q": torch.tensor([0, 3, 5, 7], dtype=torch.int32)}
    if positions:
        given["position_ids"] = torch.tensor([[7, 8, 9, 0, 1, 4, 5, 0, 0]])
    routes, _, _ = record(model, lambda: model(input_ids=ids, **given))
    assert routes.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, -1, -1]
    assert routes.position.tolist() == ([7, 8, 9, 0, 1, 4, 5] if positions else [0, 1, 2, 0, 1, 0, 1]) + [
        -1,
        -1,
    ]
    assert routes.padding.tolist() == [False] * 7 + [True, True]


def test_several_requests_in_a_row_have_positions_and_no_sequence_without_their_lengths() -> None:
    model = tiny_olmoe()
    positions = torch.tensor([[7, 3, 0, 1, 2]])
    routes, _, _ = record(model, lambda: model(input_ids=torch.arange(3, 8)[None], position_ids=positions))
    assert routes.sequence.tolist() == [-1] * 5
    assert routes.position.tolist() == positions[0].tolist()


def test_what_a_static_cache_holds_stands_before() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 3)
    cache = StaticCache(config=model.config, max_cache_len=16)

    def run() -> None:
        model(input_ids=batch["input_ids"], past_key_values=cache)
        model(input_ids=batch["input_ids"][:, :2], past_key_values=cache)

    routes, _, _ = record(model, run)
    assert routes.position.tolist() == [0, 1, 2] * 2 + [3, 4] * 2


def test_a_draft_model_beside_does_not_disturb_whose_tokens_they_are() -> None:
    model, draft, batch = tiny_olmoe(), tiny_olmoe(seed=3), token_batch(1, 4)
    routes, calls, tracer = record(
        model, lambda: model.generate(**batch, max_new_tokens=6, do_sample=False, assistant_model=draft)
    )
    assert (routes.expert_ids == received(calls)).all()
    assert set(routes.sequence.tolist()) == {0}
    starts = np.flatnonzero(np.diff(routes.forward, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(routes)], strict=True):  # each verifies a run of tokens
        assert (np.diff(routes.position[start:end]) == 1).all()
    assert routes.position.max() <= 4 + 6
    assert_same_as_samples(routes, tracer)


def test_a_block_on_its_own_and_embeddings_have_no_identity_that_nobody_told() -> None:
    model = tiny_olmoe()
    block = model.model.layers[0].mlp
    with moe_trace.MoETracer(model, routes=True) as tracer, torch.no_grad():
        block(torch.randn(2, 3, 32))
    routes = tracer.routes()
    assert routes.layers == ("model.layers.0.mlp.gate",) and len(routes) == 6
    assert set(routes.sequence.tolist()) == set(routes.position.tolist()) == {-1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_is_recorded_once_and_marked(reentrant: bool) -> None:
    model, batch = tiny_olmoe().train(), token_batch(2, 6)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with watch_experts(model) as calls, moe_trace.MoETracer(model, routes=True) as tracer:
        for _ in range(2):
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        with torch.no_grad():
            model(**batch, use_cache=False)
    routes = tracer.routes()
    assert len(calls) == 5 * LAYERS and len(routes) == 3 * 12
    assert routes.recomputed is not None
    assert routes.recomputed.tolist() == [True] * 24 + [False] * 12
    assert routes.stage.tolist() == ["train"] * 24 + ["prefill"] * 12
    assert_same_as_samples(routes, tracer)


def test_an_intervention_on_the_router_is_seen() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 6)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    force = torch.full((8,), -10.0)
    force[[6, 3]] = torch.tensor([10.0, 9.0])
    handle = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, args, output: (
            output[0],
            output[1],
            force.topk(2).indices.expand(len(output[1]), 2).contiguous(),
        )
    )
    routes, _, _ = record(model, lambda: model(**batch))
    handle.remove()
    assert (routes.expert_ids[:, 1] == [6, 3]).all()
    assert not (routes.expert_ids[:, 0] == [6, 3]).all()


def test_every_and_layers_choose() -> None:
    model, batch = tiny_olmoe(), token_batch(1, 4)
    options = Routes(every=2, layers=[0, 2])
    routes, calls, _ = record(model, lambda: [model(**batch) for _ in range(7)], options, every=2)
    assert routes.layers == ("model.layers.0.mlp.gate", "model.layers.2.mlp.gate")
    assert routes.step.tolist() == [0] * 4 + [4] * 4
    assert (routes.expert_ids[:4] == received(calls)[:4, [0, 2]]).all()
    with pytest.raises(UsageError, match=r"layers= names \['17'\]"):
        moe_trace.MoETracer(model, routes=Routes(layers=[17]))


def test_the_newest_rows_stay_within_the_bound() -> None:
    model = tiny_olmoe()
    batches = [token_batch(1, 100, seed=seed) for seed in range(8)]
    routes, calls, _ = record(model, lambda: [model(**batch) for batch in batches], Routes(max_mib=0.02))
    assert 100 < len(routes) < 800 and routes.nbytes <= 0.02 * 2**20
    assert routes.dropped == {"overwritten": 800 - len(routes)}
    assert (routes.expert_ids == received(calls)[-len(routes) :]).all()
    assert routes.position[-1] == 99 and routes.forward[-1] == 7


def test_a_reservoir_keeps_whole_sequences_and_a_fair_share_of_them() -> None:
    model = tiny_olmoe()
    batches = [token_batch(4, 25, seed=seed) for seed in range(12)]

    def run() -> None:
        for batch in batches:
            model.generate(**batch, max_new_tokens=3, do_sample=False)

    routes, _, tracer = record(model, run, Routes(max_mib=0.1, keep="reservoir"))
    total = 12 * 4 * 27
    assert 0 < len(routes) < total and routes.dropped == {"reservoir": total - len(routes)}
    generation = routes.forward // 3
    kept = {(int(g), int(s)) for g, s in zip(generation, routes.sequence, strict=True)}
    assert len(routes) == 27 * len(kept)
    assert len({g for g, _ in kept}) > 3 and min(g for g, _ in kept) < 6
    assert tracer.samples()


def test_without_routes_nothing_is_kept_and_the_model_computes_the_same() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 6)
    with torch.no_grad():
        plain = model(**batch).logits
        with moe_trace.MoETracer(model, routes=True):
            traced = model(**batch).logits
        with moe_trace.MoETracer(model) as tracer:
            model(**batch)
    assert torch.equal(plain, traced)
    assert tracer._recorder.routes is tracer._hooks.watch.routes is None
    with pytest.raises(UsageError, match="routes=True"):
        tracer.routes()


class SequenceFirst(nn.Module):
    """Ids [B, S]; its MoE sees [S, B, H], as Megatron's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.moe = nn.Embedding(50, DIM), NanoMoE()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.moe(self.embed(input_ids).transpose(0, 1).contiguous())


def test_whose_token_a_row_is_is_unknown_where_the_sequence_may_come_first() -> None:
    model = SequenceFirst().eval()
    with moe_trace.MoETracer(model, routes=Routes(token_ids=True)) as tracer, torch.no_grad():
        model(input_ids=torch.arange(12).reshape(3, 4))
        model(input_ids=torch.arange(4)[None])
    routes = tracer.routes()
    assert len(routes) == 16 and routes.token_ids is not None
    for column in (routes.sequence, routes.position, routes.token_ids):
        assert column[:12].tolist() == [-1] * 12
    assert routes.sequence[12:].tolist() == [0] * 4 and routes.token_ids[12:].tolist() == [0, 1, 2, 3]
