"""Run one tiny model of a family in the real vLLM engine, in this process, and print the results as JSON.

python family_engine.py FAMILY FOLDER: the configuration is written into the folder, weights are vLLM's dummy
ones from a seed, and the trace goes into FOLDER/traces. The last output is the tokens before, under and after
the profiler and, for each layer and each call under it, the experts that vLLM's `router.set_capture_fn`
received.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PLAIN: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN = {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN |= {"num_experts": 16, "num_experts_per_tok": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        **_QWEN,
    },
    "qwen2_moe": {  # a shared expert with a gate of its own
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 64,
        **_QWEN,
    },
    "deepseek_v3": {  # grouped top-k of biased sigmoids, shared expert, dense layer; gate in the runner
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 32,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {  # its gate is named router, and has a bias
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rope_scaling": None,
        "initial_context_length": 256,
    },
}
"""By family: what its config.json has beside the plain keys."""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], list(range(30, 60)), [70, 71, 72], [90], list(range(100, 117))]
"""More than run at a time, so that some are read while others are answered."""


def write_config(family: str, folder: Path) -> Path:
    """A folder that vLLM takes as a model."""
    config = _PLAIN | FAMILIES[family]
    if family == "deepseek_v3":
        config.pop("head_dim")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def runners(model: Any) -> dict[str, Any]:
    """By module path, what holds a router and its experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "router") and hasattr(module, "routed_experts")
    }


def capture(counts: list[list[int]], num_experts: int) -> Callable[[Any], None]:
    """What `set_capture_fn` takes: it counts each expert of each call."""
    import torch

    def count(topk_ids: Any) -> None:
        counts.append(torch.bincount(topk_ids.flatten().long().cpu(), minlength=num_experts).tolist())

    return count


def main(family: str, folder: Path) -> None:
    """Load, answer without the profiler, answer under it, print."""
    from vllm import LLM, SamplingParams

    from moe_trace.integrations.vllm.plugin import register

    register()  # as the entry point does, so that nothing must be installed
    llm = LLM(
        str(write_config(family, folder / "model")),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=3,
        seed=0,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        profiler_config={
            "profiler": "torch",
            "torch_profiler_dir": str(folder / "traces"),
            "torch_profiler_with_stack": False,
        },
    )
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

    def tokens() -> list[list[int]]:
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, sampling, use_tqdm=False)]

    plain = tokens()
    core: Any = llm.llm_engine.engine_core
    found = runners(core.engine_core.model_executor.driver_worker.worker.get_model())
    captured: dict[str, list[list[int]]] = {name: [] for name in found}
    for name, runner in found.items():
        runner.router.set_capture_fn(capture(captured[name], runner.moe_config.num_experts))
    llm.start_profile()
    profiled = tokens()
    llm.stop_profile()
    for runner in found.values():
        runner.router.set_capture_fn(None)
    after = tokens()
    print("\n" + json.dumps({"tokens": [plain, profiled, after], "captured": captured}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
