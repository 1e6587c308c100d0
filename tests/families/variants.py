"""Config fields that generic shrinking leaves wrong, shared by the variants."""

from types import MappingProxyType
from typing import Any

from .family import Family

BIAS = frozenset({"selection-bias"})
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
"""The sections sum to half of a tiny head."""
GLM_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
"""GLM rotates half of the head only."""
ERNIE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    "moe_intermediate_size": [48, 24],
}
"""Height and width must be equal; experts of text tokens are wider than those of image tokens."""
HYBRID: dict[str, Any] = {"layer_types": ["full_attention", "linear_attention", "full_attention"]}
LATENT_DENSE_FIRST: dict[str, Any] = (
    {"qk_rope_head_dim": 0} | HYBRID | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
)
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
HASH_FIRST = {"mlp_layer_types": ["hash_moe", "moe", "moe"]}
NO_SLIDING = {"layer_types": ["full_attention"] * 3}
QWEN_DENSE_FIRST = {"mlp_only_layers": [0]}
GEMMA_MOE = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


TALKER = {"text_config": MROPE | {"shared_expert_intermediate_size": 40}, "spatial_merge_size": 2}
"""Fields that the model reads and transformers' own config classes lack."""
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


def variant(name: str, model: str, calls: int, *traits: str, **fields: Any) -> Family:
    """One entry of the bench, with its traits as plain arguments."""
    overrides = MappingProxyType(fields.pop("overrides", {}))
    return Family(
        name=name, model=model, calls=calls, traits=frozenset(traits), overrides=overrides, **fields
    )
