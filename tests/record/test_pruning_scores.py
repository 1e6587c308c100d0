"""Tests of REAP, EAN, frequency and gate mass against each expert computed separately from its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hand_written
from families.configs import BY_NAME
from models import tiny_olmoe, token_batch
from moe_trace import PruningScores, find_routers
from moe_trace.data.errors import UsageError

Norms = list[tuple[int, float, float]]


def brute_force(model: Any, batch: dict[str, Tensor]) -> list[Norms]:
    """(expert, weight, norm of its output) of every slot without padding, by layer, one token at a time."""
    seen: list[Norms] = []
    handles = []
    for layer in model.model.layers:
        found: Norms = []
        seen.append(found)

        def hook(experts: Any, args: Any, found: Norms = found) -> None:
            hidden, index, weights = args
            kept = batch["attention_mask"].flatten().bool()
            for token in torch.where(kept)[0].tolist():
                for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    out = experts.down_proj[expert] @ (F.silu(gate) * up)
                    found.append((expert, weight, float(out.norm())))

        handles.append(layer.mlp.experts.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def assert_scores(found: Any, slots: Norms, experts: int) -> None:
    for e in range(experts):
        own = [(weight, norm) for expert, weight, norm in slots if expert == e]
        assert found.frequency[e] == len(own)
        assert found.gate_mass[e] == pytest.approx(sum(w for w, _ in own), rel=1e-4)
        mean = [
            sum(x) / len(own) if own else math.nan for x in ([n for _, n in own], [w * n for w, n in own])
        ]
        assert (found.ean[e], found.reap[e]) == pytest.approx(mean, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_scores_equal_those_of_each_expert_alone(implementation: str) -> None:
    model = tiny_olmoe(layers=2)
    model.set_experts_implementation(implementation)
    batch = token_batch()
    batch["attention_mask"][0, :5] = 0
    truth = brute_force(model, batch)
    with torch.no_grad():
        alone = model(**batch).logits
        with PruningScores(model) as scores:
            assert torch.equal(model(**batch).logits, alone)
    assert not scores.unscored and list(scores.layers) == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    for found, slots in zip(scores.layers.values(), truth, strict=True):
        assert found.tokens == int(batch["attention_mask"].sum())
        assert_scores(found, slots, 8)


def test_batches_add_up_and_hooks_are_gone_afterwards() -> None:
    model = tiny_olmoe(layers=1)
    batches = [token_batch(seed=seed) for seed in (1, 2)]
    truth = [slot for batch in batches for slot in brute_force(model, batch)[0]]
    with torch.no_grad(), PruningScores(model) as scores:
        for batch in batches:
            model(**batch)
    model(**batches[0])
    (found,) = scores.layers.values()
    assert_scores(found, truth, 8)


def test_gradients_are_those_of_a_model_that_is_not_measured() -> None:
    model, batch = tiny_olmoe(layers=1), token_batch()
    gradients = []
    for measured in (False, True):
        model.zero_grad()
        if measured:
            with PruningScores(model):
                loss = model(**batch, labels=batch["input_ids"]).loss
        else:
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        gradients.append(model.model.layers[0].mlp.experts.down_proj.grad.clone())
    assert torch.equal(*gradients)


def test_experts_that_are_modules_of_their_own() -> None:
    torch.manual_seed(0)
    block = hand_written.Mixtral()
    x = torch.randn(2, 9, hand_written.DIM)
    with torch.no_grad(), PruningScores(nn.Sequential(block)) as scores:
        block(x)
    (found,) = scores.layers.values()
    flat = x.view(-1, hand_written.DIM)
    weights, index = block.gate(flat).softmax(-1).topk(block.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    slots = [
        (e, float(w), float(block.experts[e](flat[token]).norm()))
        for token in range(len(flat))
        for e, w in zip(index[token].tolist(), weights[token], strict=True)
    ]
    assert_scores(found, slots, hand_written.EXPERTS)


def test_experts_that_give_something_else_have_no_scores_but_a_reason() -> None:
    model, batch = tiny_olmoe(layers=2), token_batch()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad(), PruningScores(model) as scores:
        model(**batch)
    assert list(scores.layers) == ["model.layers.1.mlp.gate"]
    assert "do not add up" in scores.unscored["model.layers.0.mlp.gate"]


def test_scores_are_written_as_json_and_npz(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1, experts=64)
    with torch.no_grad(), PruningScores(model) as scores:
        model(**token_batch(1, 4))
    ((name, found),) = scores.layers.items()
    scores.save(tmp_path / "s.json")
    plain = json.loads((tmp_path / "s.json").read_text())
    assert plain["unscored"] == {}
    reap = [math.nan if value is None else value for value in plain["layers"][name]["reap"]]
    assert np.array_equal(reap, found.reap, equal_nan=True) and np.isnan(reap).any()
    scores.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as arrays:
        assert np.array_equal(arrays[f"{name}/frequency"], found.frequency)
        assert arrays[f"{name}/tokens"] == 4
    with pytest.raises(UsageError, match="ends in"):
        scores.save(tmp_path / "s.txt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.json", "s.npz"]


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "longcat_flash", "llama4", "jetmoe"]
)
def test_families_are_scored_or_say_why_not(name: str) -> None:
    """What is scored adds up to what the layers gave: that is checked in each call."""
    family = BY_NAME[f"{name}/text"]
    model = family.build()
    routers = [site.name for site in find_routers(model)]
    with PruningScores(model) as scores:
        family.run(model)
    if name in ("llama4", "jetmoe", "longcat_flash"):
        assert not scores.layers and set(scores.unscored) == set(routers)
        assert all("not scored" in why or "one slot alone" in why for why in scores.unscored.values())
        return
    assert list(scores.layers) == routers and not scores.unscored
    for layer in scores.layers.values():
        chosen = layer.frequency > 0
        assert (layer.reap[chosen] > 0).all() and np.isnan(layer.reap[~chosen]).all()
