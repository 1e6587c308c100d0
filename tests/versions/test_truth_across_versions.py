"""Tests that must pass on every version that setup.cfg admits, in about a minute.

`scripts/test_versions.sh` runs this file in environments of other versions of transformers and torch. It
only uses public names of both, so that it can run on all of them. Its oracles are the experts' inputs and the
router's weights.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moe_trace

LAYERS, EXPERTS, TOP_K, VOCAB = 2, 8, 2, 97
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "olmoe": ("Olmoe", {}),
    "mixtral": ("Mixtral", {}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {}),
    "flex_olmo": ("FlexOlmo", {}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "minimax": ("MiniMax", {"layer_types": ["full_attention"] * LAYERS}),
    "deepseek_v3": ("DeepseekV3", {}),
    "gpt_oss": ("GptOss", {"layer_types": ["full_attention"] * LAYERS}),
}


def model_of(family: str) -> Any:
    """A tiny random model, whose routers' weights are large enough that choices differ."""
    prefix, changes = FAMILIES[family]
    package = pytest.importorskip(f"transformers.models.{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    known = getattr(package, f"{prefix}Config")()
    values = {key: value for key, value in (SMALL | changes).items() if hasattr(known, key)}
    torch.manual_seed(0)
    model = getattr(module, f"{prefix}ForCausalLM")(type(known)(**values)).eval()
    with torch.no_grad():
        for site in moe_trace.find_routers(model):
            for name, weight in site.router.named_parameters():
                if weight.dim() == 2 and name.endswith("weight"):
                    weight.normal_(std=1.0)
    return model


class Watched:
    """What the experts received and what the routers' own weights say, by layer and call."""

    def __init__(self, model: Any) -> None:
        self.counts: dict[int, list[list[int]]] = {layer: [] for layer in range(LAYERS)}
        self.hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(LAYERS)}
        self.sites = moe_trace.find_routers(model)
        assert [site.layer for site in self.sites] == list(range(LAYERS))

    def logits(self, layer: int, call: int) -> torch.Tensor:
        """[T, E] in float64, from the hidden states that the router received."""
        router = self.sites[layer].router
        hidden = self.hidden[layer][call].detach().double().flatten(0, -2)
        bias = getattr(router, "bias", None)
        logits = hidden @ router.weight.detach().double().T
        return logits if bias is None else logits + bias.detach().double()


@contextmanager
def watch(model: Any) -> Iterator[Watched]:
    """Hooks of the test's own on every router and its experts."""
    seen = Watched(model)

    def before_experts(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [*args, *kwargs.values()][1:]
            whole = [t for t in given if torch.is_tensor(t) and not t.is_floating_point()]
            seen.counts[layer].append(np.bincount(whole[0].flatten().numpy(), minlength=EXPERTS).tolist())

        return hook

    def before_router(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.hidden[layer].append([*args, *kwargs.values()][0])

        return hook

    handles = []
    for site in seen.sites:
        assert site.experts is not None
        handles.append(site.experts.register_forward_pre_hook(before_experts(site.layer), with_kwargs=True))
        handles.append(site.router.register_forward_pre_hook(before_router(site.layer), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def batch(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_what_the_experts_received(family: str) -> None:
    model = model_of(family)
    with torch.no_grad(), watch(model) as seen, moe_trace.MoETracer(model) as tracer:
        model(**batch())
        model(**batch(3, 5))
    found: dict[int, list[list[int]]] = {layer: [] for layer in range(LAYERS)}
    for sample in tracer.samples():
        found[sample.layer].append(sample.assignments.tolist())
    assert found == seen.counts
    assert sum(map(sum, found[0])) == (2 * 9 + 3 * 5) * TOP_K


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_of_logits_are_true_or_absent(family: str) -> None:
    model = model_of(family)
    with torch.no_grad(), watch(model) as seen, moe_trace.MoETracer(model) as tracer:
        model(**batch())
    for sample in tracer.samples():
        logits = seen.logits(sample.layer, sample.call)
        log_p = logits.log_softmax(-1)
        entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        z_loss = float(logits.logsumexp(-1).square().mean())
        top1 = float(log_p.exp().max(-1).values.mean())
        for figure, truth in [
            (sample.router_entropy, entropy),
            (sample.z_loss, z_loss),
            (sample.top1_prob, top1),
        ]:
            assert figure is None or math.isclose(figure, truth, rel_tol=2e-3), (figure, truth)


def test_logits_that_are_absent_are_explained() -> None:
    model = model_of("olmoe")
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**batch())
    if any(sample.z_loss is None for sample in tracer.samples()):
        assert any("logits" in note or "probabilities" in note for note in tracer.summary().notes)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_generate_on_padded_rows_has_stages_and_padding(family: str) -> None:
    model, inputs, new = model_of(family), batch(), 4
    inputs["input_ids"][0, :3] = 0
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    for layer in range(LAYERS):
        samples = [s for s in tracer.samples() if s.layer == layer]
        assert [s.stage for s in samples] == ["prefill"] + ["decode"] * (new - 1)
        assert [s.padding_assignments for s in samples] == [3 * TOP_K] + [0] * (new - 1)
    assert not [note for note in tracer.summary().notes if "mask" in note or "padding" in note]


def test_training_tells_recomputed_calls_apart() -> None:
    model = model_of("olmoe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with moe_trace.MoETracer(model) as tracer:
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
    counted = {phase: sum(s.phase == phase for s in tracer.samples()) for phase in ("forward", "recompute")}
    assert counted == {"forward": LAYERS, "recompute": LAYERS}
    assert {s.stage for s in tracer.samples()} == {"train"}


@pytest.mark.parametrize("activity", ["tracer", "profile"])
def test_compiled_code_counts_the_same_and_is_not_compiled_again(activity: str) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    model = model_of("olmoe")
    # transformers 5.0 cannot trace its grouped products in single precision, with or without us.
    model.set_experts_implementation("batched_mm")
    with torch.no_grad(), watch(model) as seen:
        model(**batch(), use_cache=False)
    expected = [seen.counts[layer][0] for layer in range(LAYERS)]
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graphs))
        return graph

    tracer = moe_trace.MoETracer(model)
    with torch.no_grad(), tracer:
        compiled = torch.compile(model, backend=backend)
        compiled(**batch(), use_cache=False)
        once = len(graphs)
        if activity == "profile":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
                tracer.attach(prof)
                compiled(**batch(), use_cache=False)
        compiled(**batch(), use_cache=False)
    assert len(graphs) == once, "compiled again"
    by_layer: dict[int, list[list[int]]] = {layer: [] for layer in range(LAYERS)}
    for sample in tracer.samples():
        by_layer[sample.layer].append(sample.assignments.tolist())
    calls = 3 if activity == "profile" else 2
    assert by_layer == {layer: [expected[layer]] * calls for layer in range(LAYERS)}
    dynamo.reset()


def test_a_trace_holds_every_call_in_its_place(tmp_path: Path) -> None:
    model, path = model_of("olmoe"), tmp_path / "trace.json"
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with moe_trace.profile(model, activities=activities) as prof:
            model(**batch())
            model(**batch())
        prof.export_chrome_trace(str(path))
    summary = moe_trace.read_summary(path)
    assert [router.calls for router in summary.routers] == [2] * LAYERS
    events = json.loads(path.read_text())["traceEvents"]
    ranges = [
        e["name"] for e in events if e.get("ph") == "X" and str(e.get("name")).startswith("moe.router/")
    ]
    assert sorted(ranges) == sorted([f"moe.router/L{layer:02d}" for layer in range(LAYERS)] * 2)
    assert [e for e in events if e.get("ph") == "C" and e["name"].startswith("load")]


def test_nothing_is_left_and_nothing_changed() -> None:
    model = model_of("olmoe")
    with torch.no_grad():
        bare = model(**batch()).logits
        with moe_trace.MoETracer(model):
            traced = model(**batch()).logits
        after = model(**batch()).logits
    assert torch.equal(bare, traced) and torch.equal(bare, after)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_backend_that_learns_of_public_ranges_alone_is_told_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`cupti_monitor` hears of ranges in `record_function.__enter__`. Its own run needs a GPU and CUPTI."""
    config = torch.profiler._ExperimentalConfig(custom_profiler_config="cupti_monitor")
    if not hasattr(config, "custom_profiler_config"):
        pytest.skip("this torch has no such backend")
    told: list[str] = []
    enter = torch.profiler.record_function.__enter__

    def listen(entered: Any) -> Any:
        told.append(entered.name)
        return enter(entered)

    monkeypatch.setattr(torch.profiler.record_function, "__enter__", listen)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    model = model_of("olmoe")
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer, torch.profiler.profile(activities=cpu):
        model(**batch())
        assert not [name for name in told if name.startswith("moe.router")]
        asked = torch.profiler.profile(activities=cpu, experimental_config=config)
        tracer.attach(asked)
        model(**batch())
    assert [name for name in told if name.startswith("moe.router")] == ["moe.router/L00", "moe.router/L01"]
