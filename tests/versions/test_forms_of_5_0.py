"""Tests of families whose routers had special output formats in the first releases of transformers 5.

HunYuan and Phimoe passed dense weights to their experts, and AFMoE an index by row and position. Switch
returned no logits, and Aria's experts selected themselves. The oracle intervenes on the weights of experts
and routers.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import moe_trace
from families.oracle import Intervention

EXPERTS, TOP_K, VOCAB = 8, 2, 97
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SWITCH = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": EXPERTS,
    "expert_capacity": 3,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hunyuan_v1_moe": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        SMALL | {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 8, "num_shared_expert": 1},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        SMALL | {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        "AfmoeConfig",
        SMALL
        | {"moe_intermediate_size": 16, "head_dim": 8, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        | {"num_dense_layers": 0, "num_shared_experts": 1},
    ),
    "aria": (
        "AriaTextForCausalLM",
        "AriaTextConfig",
        SMALL | {"moe_num_experts": EXPERTS, "moe_topk": TOP_K},
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        SWITCH,
    ),
}


def model_of(family: str) -> Any:
    """A tiny random model, whose routers' weights are large enough that choices differ."""
    model_name, config_name, values = FAMILIES[family]
    models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    torch.manual_seed(0)
    model = getattr(models, model_name)(getattr(configs, config_name)(**values)).eval()
    with torch.no_grad():
        for site in moe_trace.find_routers(model):
            router_weight(site.router).normal_(std=1.0)
    return model


def router_weight(router: nn.Module) -> torch.Tensor:
    """[E, H]"""
    (weight,) = [weight for weight in router.parameters() if weight.dim() == 2 and weight.shape[0] == EXPERTS]
    return weight


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": ids[:, :5]} if family == "switch_transformers" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder}


class RouterInputs:
    """What each router received, and what Aria's first experts counted."""

    def __init__(self, model: nn.Module) -> None:
        self.hidden: dict[str, torch.Tensor] = {}
        self.counted: list[list[int]] = []
        self.handles = []
        for site in moe_trace.find_routers(model):
            self.handles.append(site.router.register_forward_pre_hook(self._keep(site.name)))
            first = getattr(site.experts, "fc1", None)
            if first is not None:
                self.handles.append(first.register_forward_pre_hook(self._count))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.hidden[name] = args[0].detach()

        return hook

    def _count(self, module: nn.Module, args: Any) -> None:
        self.counted.append(args[1].tolist())

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_read_truly(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with torch.no_grad(), Intervention(model) as watch:
        seen = RouterInputs(model)
        model(**inputs)
        seen.close()
    truth = [found.assignments.tolist() for found in watch.truths()] or seen.counted
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with moe_trace.MoETracer(model) as tracer:
            model(**inputs)
    samples = tracer.samples()
    assert len(samples) == 2
    assert [sample.assignments.tolist() for sample in samples] == truth
    weights = {site.name: router_weight(site.router) for site in tracer.sites}
    for sample in samples:
        logits = seen.hidden[sample.name].flatten(0, -2).double() @ weights[sample.name].double().T
        log_p = logits.log_softmax(-1)
        entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        z_loss = float(logits.logsumexp(-1).square().mean())
        if sample.router_entropy is None:
            assert sample.z_loss is None
            assert any("returns no logits" in note for note in tracer.summary().notes)
        else:
            assert math.isclose(sample.router_entropy, entropy, rel_tol=2e-3)
            assert sample.z_loss is not None and math.isclose(sample.z_loss, z_loss, rel_tol=2e-3)
    assert all(router.info.top_k in (1, TOP_K) for router in tracer.summary().routers)
