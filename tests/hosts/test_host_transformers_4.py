"""transformers 4.57: linear gates beside lists of experts, and routers that return other forms than in 5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import (
    EXPERTS,
    TOP_K,
    RowsEntered,
    computes_the_same,
    counts,
    flops_are_those_that_torch_counts,
    randomised,
    recorded,
    report_shows_every_layer,
)

import moe_trace
from moe_trace.demo import DEMO_PROMPTS

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LAYERS = 2
_ALL = {"num_key_value_heads": 4, "num_hidden_layers": LAYERS, "pad_token_id": 0}
_OF_8 = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_LOCAL_8 = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_DEEPSEEK = {
    **{"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 16},
    **{"first_k_dense_replace": 0, "n_group": 2, "topk_group": 1},
}
_MLA = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
}
# Configuration by family; whether the gate is a linear layer and its output the logits.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "Olmoe": (_OF_8, True),
    "Mixtral": (_LOCAL_8, True),
    "Qwen3Moe": ({**_OF_8, "moe_intermediate_size": 16, "head_dim": 8}, True),
    "Qwen2Moe": ({**_OF_8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, True),
    "Phimoe": (_LOCAL_8, True),
    "FlexOlmo": (_OF_8, True),
    "MiniMax": ({**_LOCAL_8, "head_dim": 8}, True),
    "Ernie4_5_Moe": (
        {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
        True,
    ),
    "HunYuanMoEV1": ({"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 8}, True),
    "DeepseekV2": ({**_DEEPSEEK, **_MLA, "topk_method": "group_limited_greedy"}, False),
    "DeepseekV3": ({**_DEEPSEEK, **_MLA}, False),
    "Glm4Moe": ({**_DEEPSEEK, "head_dim": 8}, False),
    "Dots1": ({**_DEEPSEEK, "n_shared_experts": 1, "head_dim": 8}, False),
}


def built(family: str, **options: Any) -> Any:
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 4.57 is not installed")
    config = getattr(transformers, f"{family}Config")(**SIZES, **_ALL, **options)
    return randomised(getattr(transformers, f"{family}ForCausalLM")(config)).eval()


def experts_of(model: Any) -> list[RowsEntered]:
    lists = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "experts"]
    return [RowsEntered(experts) for experts in lists]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_equals_the_rows_that_enter_each_expert(family: str) -> None:
    options, is_gate = FAMILIES[family]
    model = built(family, **options)
    oracle = experts_of(model)
    for length in (7, 1, 30):
        ids = torch.randint(1, 64, (2, length))
        with torch.no_grad():
            samples = recorded(model, lambda ids=ids: model(ids))
        assert [counts(sample) for sample in samples] == [rows.take() for rows in oracle]
        assert len(samples) == LAYERS
        assert all((sample.router_entropy is not None) == is_gate for sample in samples)
        assert all((sample.tokens, sample.top_k) == (2 * length, TOP_K) for sample in samples)


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "Qwen3Moe", "Qwen2Moe", "DeepseekV3"])
def test_transformers_4_computes_the_same_with_the_tracer(family: str) -> None:
    model = built(family, **FAMILIES[family][0]).train()
    ids = torch.randint(1, 64, (2, 9))
    computes_the_same(model, lambda: model(ids).logits)


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "Qwen2Moe", "Dots1"])
def test_transformers_4_flops_are_those_that_torch_counts(family: str) -> None:
    model = built(family, **FAMILIES[family][0])
    block = model.model.layers[0]
    block = block.mlp if hasattr(block, "mlp") else block.block_sparse_moe
    flops_are_those_that_torch_counts(block, lambda: block(torch.randn(2, 9, 32)))


def test_transformers_4_recomputes_the_same_choice() -> None:
    model = built("Olmoe", **_OF_8).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle = experts_of(model)
    samples = recorded(model, lambda: model(torch.randint(1, 64, (2, 9))).logits.sum().backward())
    forward, again = samples[:LAYERS], samples[LAYERS:]
    assert {s.phase for s in forward} == {"forward"} and {s.phase for s in again} == {"recompute"}
    assert [counts(s) for s in forward] == [counts(s) for s in again[::-1]]
    assert [[2 * n for n in counts(s)] for s in forward] == [rows.take() for rows in oracle]


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "DeepseekV3"])
def test_transformers_4_report_shows_every_layer(family: str, tmp_path: Path, capsys: Any) -> None:
    model = built(family, **FAMILIES[family][0])
    with torch.no_grad():
        report_shows_every_layer(model, lambda: model(torch.randint(1, 64, (2, 9))), tmp_path, capsys)


def test_transformers_4_an_intervention_on_the_gate_moves_every_token() -> None:
    model = built("Olmoe", **_OF_8)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.register_forward_hook(
            lambda module, args, out: out.index_fill(1, torch.tensor([1, 6]), 9.0)
        )
    with torch.no_grad():
        samples = recorded(model, lambda: model(torch.randint(1, 64, (2, 7))))
    assert [counts(sample) for sample in samples] == [[0, 14, 0, 0, 0, 0, 14, 0]] * LAYERS


def test_transformers_4_gpt_oss_equals_what_its_experts_are_told() -> None:
    model = built("GptOss", head_dim=8, **_LOCAL_8)
    told: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            module.register_forward_pre_hook(
                lambda module, args, kwargs: told.append(kwargs["router_indices"]), with_kwargs=True
            )
    with torch.no_grad():
        samples = recorded(model, lambda: model(torch.randint(1, 64, (2, 7))))
    expected = [torch.bincount(index.flatten(), minlength=EXPERTS).tolist() for index in told]
    assert [counts(sample) for sample in samples] == expected
    assert all(sample.router_entropy is None for sample in samples)


_OF_THE_DEMO = """
import json, sys, torch, transformers, moe_trace
from moe_trace.demo import DEMO_PROMPTS, demo_path
model = transformers.OlmoeForCausalLM.from_pretrained(
    demo_path(), dtype=torch.float32, local_files_only=True
).eval()
tokenizer = transformers.ByT5Tokenizer()
calls = []
with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
    for prompt in DEMO_PROMPTS.values():
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    calls = [
        [s.name, s.stage, s.tokens, s.top_k, s.assignments.tolist(), round(s.router_entropy, 3)]
        for s in tracer.samples()
    ]
print(json.dumps([transformers.__version__, calls]))
"""


def test_the_same_olmoe_gives_the_same_counts_in_transformers_4_and_5() -> None:
    """The demo model's weights; each call of each layer, prefill and decode."""
    built("Olmoe", **_OF_8)  # skips where 4.57 is not installed
    root = str(Path(moe_trace.__file__).parents[1])
    found = []
    for path in (os.environ["PYTHONPATH"], root):
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", "-c", _OF_THE_DEMO]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
    (old, before), (new, now) = found
    assert old.startswith("4.57") and int(new.split(".")[0]) >= 5
    assert before == now and len(now) == 4 * len(DEMO_PROMPTS) * 6
