"""Shrink a transformers config class to a tiny model, whatever the names of its fields.

Config classes are dataclasses, so the fields (and which of them are ``None`` by default, meaning "this model
has no such part") are known without building the full-size model.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN = 64
VOCAB = 128
EXPERTS = 8
TOP_K = 2
FIRST_SPECIAL_ID = 100
"""Ordinary tokens lie below, so that no drawn token is an image or audio placeholder by accident."""

TINY: dict[str, Any] = {
    # sizes of the stream
    **dict.fromkeys(("hidden_size", "d_model", "output_dim", "out_hidden_size", "text_hidden_size"), HIDDEN),
    **dict.fromkeys(("n_embd", "dim", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("projector_hidden_size", "projector_output_dim", "projector_input_dim"), HIDDEN),
    **dict.fromkeys(("vision_output_dim", "thinker_hidden_size", "projection_hidden_dim"), HIDDEN),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "decoder_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "d_ff"), 96),
    **dict.fromkeys(("ffn_dim", "hidden_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "mlp_dim"), 96),
    **dict.fromkeys(("prefix_dense_intermediate_size", "projection_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("shared_experts_intermediate_size", "share_expert_dim"), 40),
    "moe_shared_expert_intermediate_size": 40,
    "moe_hidden_size": 40,
    "moe_latent_size": 40,
    "router_hidden_size": 32,
    # depth
    **dict.fromkeys(
        ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers", "depth"), 3
    ),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    # attention
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "swa_head_dim", "global_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "swa_v_head_dim", "linear_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "o_groups": 2,
    **dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    "sliding_window": 4,
    "sliding_window_size": 4,
    "d_rel": 8,
    "rel_extent": 16,
    # state space models
    **dict.fromkeys(
        ("mamba_d_state", "ssm_state_size", "mamba_head_dim", "chunk_size", "mamba_chunk_size"), 16
    ),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    "n_groups": 2,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "zero_expert_num": 4,
    # the rest
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "image_size": 28,
    "patch_size": 14,
}
"""Field name -> value in a tiny model. What is ``None`` by default stays ``None`` unless it is in FORCED."""

FORCED = frozenset({"n_routed_experts", "pad_token_id", "eos_token_id", "bos_token_id", "initializer_range"})
"""Set although the default is ``None``: without these the class cannot be built, or generation never ends."""


def shrunk_config(
    config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A tiny config of ``config_class``; ``overrides`` wins, nested under the names of the sub-configs."""
    overrides = dict(overrides or {})
    kwargs = _tiny_fields(config_class)
    specs = getattr(config_class, "sub_configs_defaults", None) or config_class.sub_configs
    for name, spec in specs.items():
        kwargs[name] = _shrunk_part(spec, overrides.pop(name, {}))
    return config_class(**(kwargs | overrides))


def _shrunk_part(spec: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The config inside a composite one: the family's own default, or the ``model_type`` of the overrides."""
    required = getattr(spec, "init_kwargs", {}).items()
    small = {name: value for name, value in required if name not in TINY and not isinstance(value, dict)}
    overrides = small | overrides
    model_type = overrides.pop("model_type", None)
    config_class = getattr(spec, "config_class", spec)
    if model_type is not None or not hasattr(config_class, "num_labels"):
        config_class = CONFIG_MAPPING[model_type or spec.model_type]
    return shrunk_config(config_class, overrides)


def _tiny_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    tiny: dict[str, Any] = {}
    next_special_id = FIRST_SPECIAL_ID
    for name, default in fields.items():
        if name in TINY and (default is not None or name in FORCED):
            tiny[name] = TINY[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
            tiny[name] = next_special_id
            next_special_id += 1
    tiny |= _key_value_heads(fields)
    return tiny


def _key_value_heads(fields: dict[str, Any]) -> dict[str, int]:
    """Latent attention, and models with as many key-value heads as heads by default, must keep them equal."""
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    equal = "kv_lora_rank" in fields or (heads is not None and heads == groups)
    return {"num_key_value_heads": TINY["num_attention_heads"]} if equal and groups is not None else {}
