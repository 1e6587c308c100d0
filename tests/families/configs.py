"""The bench: every Mixture-of-Experts family of transformers, in the forms in which a user meets it."""

from types import MappingProxyType
from typing import Any

from .family import Family
from .inputs import canvas_inputs, embedding_inputs, image_inputs, patch_inputs, vision_token_inputs

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


def _family(name: str, model: str, calls: int, *traits: str, **fields: Any) -> Family:
    overrides = MappingProxyType(fields.pop("overrides", {}))
    return Family(
        name=name, model=model, calls=calls, traits=frozenset(traits), overrides=overrides, **fields
    )


TOP_K_OF_LOGITS = (
    _family("aria/text", "AriaTextForCausalLM", 3),
    _family("cohere2_moe/softmax", "Cohere2MoeForCausalLM", 3),
    _family(
        "cohere2_moe/sigmoid",
        "Cohere2MoeForCausalLM",
        2,
        overrides={"expert_selection_fn": "sigmoid", "first_k_dense_replace": 1, "num_shared_experts": 1},
    ),
    _family(
        "dbrx/text",
        "DbrxForCausalLM",
        3,
        overrides={"attn_config": {"clip_qkv": 8.0, "rope_theta": 1e4}},
        implementations=False,
    ),
    _family(
        "deepseek_ocr2/text", "DeepseekOcr2TextModel", 2, overrides=DENSE_FIRST | {"num_experts_per_tok": 2}
    ),
    _family("deepseek_v2/greedy", "DeepseekV2ForCausalLM", 2, overrides={"num_experts_per_tok": 2}),
    _family("flex_olmo/text", "FlexOlmoForCausalLM", 3),
    _family("flint/text", "FlintForCausalLM", 2, overrides=QWEN_DENSE_FIRST),
    _family("gpt_oss/text", "GptOssForCausalLM", 3),
    _family("granitemoe/text", "GraniteMoeForCausalLM", 3),
    _family("granitemoe_swa/text", "GraniteMoeSWAForCausalLM", 3),
    _family("granitemoehybrid/text", "GraniteMoeHybridForCausalLM", 3, overrides=HYBRID),
    _family(
        "granitemoeshared/text", "GraniteMoeSharedForCausalLM", 3, overrides={"shared_intermediate_size": 40}
    ),
    _family("hunyuan_v1_moe/text", "HunYuanMoEV1ForCausalLM", 3, overrides={"head_dim": 16}),
    _family(
        "hunyuan_v1_moe/per_layer",
        "HunYuanMoEV1ForCausalLM",
        3,
        k=None,
        overrides={"head_dim": 16, "moe_topk": [1, 2, 3]},
        note="another k in every layer",
    ),
    _family("jamba/text", "JambaForCausalLM", 1, overrides={"attn_layer_period": 2, "attn_layer_offset": 0}),
    _family("mellum/text", "MellumForCausalLM", 3),
    _family("minimax/text", "MiniMaxForCausalLM", 3),
    _family("mixtral/text", "MixtralForCausalLM", 3),
    _family("olmoe/text", "OlmoeForCausalLM", 3),
    _family("openai_privacy_filter/base", "OpenAIPrivacyFilterModel", 3),
    _family("phimoe/text", "PhimoeForCausalLM", 3),
    _family("qwen2_moe/text", "Qwen2MoeForCausalLM", 2, overrides=QWEN_DENSE_FIRST),
    _family("qwen3_5_moe/text", "Qwen3_5MoeForCausalLM", 3, overrides=HYBRID),
    _family("qwen3_moe/text", "Qwen3MoeForCausalLM", 2, overrides=QWEN_DENSE_FIRST),
    _family("qwen3_next/text", "Qwen3NextForCausalLM", 2, overrides=QWEN_DENSE_FIRST | HYBRID),
    _family(
        "qwen3_omni_moe/thinker_text", "Qwen3OmniMoeThinkerTextModel", 2, overrides=QWEN_DENSE_FIRST | MROPE
    ),
    _family("qwen3_vl_moe/text", "Qwen3VLMoeTextModel", 2, overrides=QWEN_DENSE_FIRST | MROPE),
    _family("qwen4_exp/text", "Qwen4ExpForCausalLM", 3, overrides=HYBRID | INDEXER),
    _family("unlimited_ocr/text", "UnlimitedOcrTextModel", 2, overrides=DENSE_FIRST),
)

GROUPED = (
    _family("axk1/text", "AXK1ForCausalLM", 2, *BIAS),
    _family("axk2/grouped", "AXK2ForCausalLM", 2, *BIAS, overrides={"n_group": 4, "topk_group": 2}),
    _family("axk2/flat", "AXK2ForCausalLM", 2, *BIAS),
    _family("bailing_hybrid/text", "BailingHybridForCausalLM", 2, *BIAS, overrides=HYBRID),
    _family("beam/text", "BeamForCausalLM", 2, *BIAS, overrides=DENSE_FIRST),
    _family(
        "deepseek_v2/group_limited_greedy",
        "DeepseekV2ForCausalLM",
        2,
        "selection-bias",
        overrides={
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    ),
    _family("deepseek_v3/text", "DeepseekV3ForCausalLM", 2, *BIAS),
    _family("deepseek_v3/flat", "DeepseekV3ForCausalLM", 2, *BIAS, overrides={"n_group": 1, "topk_group": 1}),
    _family("deepseek_v32/text", "DeepseekV32ForCausalLM", 2, *BIAS),
    _family(
        "dots1/text",
        "Dots1ForCausalLM",
        2,
        *BIAS,
        overrides={"n_shared_experts": 1, "num_experts_per_tok": 2},
    ),
    _family("dots3_note/text", "Dots3NoteForCausalLM", 2, *BIAS, overrides=NO_SLIDING),
    _family("exaone_moe/text", "ExaoneMoeForCausalLM", 2, *BIAS),
    _family("glm4_moe/text", "Glm4MoeForCausalLM", 2, *BIAS),
    _family("glm4_moe_lite/text", "Glm4MoeLiteForCausalLM", 2, *BIAS),
    _family("glm4v_moe/text", "Glm4vMoeTextModel", 2, *BIAS, overrides=GLM_MROPE),
    _family("glm5_next/text", "Glm5NextTextModel", 2, *BIAS, overrides=LATENT_DENSE_FIRST),
    _family("glm_moe_dsa/text", "GlmMoeDsaForCausalLM", 2, *BIAS),
    _family("hy_v4/text", "HYV4ForCausalLM", 2, *BIAS),
    _family("kimi_linear/text", "KimiLinearForCausalLM", 2, *BIAS, overrides=HYBRID),
    _family("mimo_v2_flash/text", "MiMoV2FlashForCausalLM", 2, *BIAS),
    _family("mistral4/text", "Mistral4ForCausalLM", 2, *BIAS),
    _family("mistral_large4/text", "MistralLarge4TextModel", 2, *BIAS),
    _family("nemotron_h/plain", "NemotronHForCausalLM", 1, *BIAS),
    _family("nemotron_h/latent", "NemotronHForCausalLM", 1, *BIAS, overrides={"moe_latent_size": 40}),
    _family("solar_open/text", "SolarOpenForCausalLM", 3, *BIAS),
)

BIASED = (
    _family("afmoe/text", "AfmoeForCausalLM", 2, *BIAS),
    _family("deepseek_v4/text", "DeepseekV4ForCausalLM", 3, "hash", *BIAS, overrides=HASH_FIRST),
    _family("ernie4_5_moe/text", "Ernie4_5_MoeForCausalLM", 2, *BIAS),
    _family("hy_v3/text", "HYV3ForCausalLM", 2, *BIAS),
    _family("inkling/text", "InklingForCausalLM", 3, *BIAS),
    _family("inkling2/text", "Inkling2ForCausalLM", 3, *BIAS),
    _family("kolibri1/text", "Kolibri1ForCausalLM", 3, *BIAS),
    _family("laguna/text", "LagunaForCausalLM", 2, *BIAS),
    _family("lfm2_moe/text", "Lfm2MoeForCausalLM", 2, *BIAS, overrides=NO_SLIDING),
    _family(
        "longcat_flash/text",
        "LongcatFlashForCausalLM",
        3,
        "identity-experts",
        *BIAS,
        k=None,
        overrides={"head_dim": 8, "moe_topk": 3},
        implementations=False,
    ),
    _family("minimax_m2/text", "MiniMaxM2ForCausalLM", 3, *BIAS),
    _family("minimax_m3_vl/text", "MiniMaxM3VLForCausalLM", 3, *BIAS),
    _family("muse_spark/text", "MuseSparkTextModel", 3, *BIAS),
    _family(
        "step3p7/text",
        "Step3p7TextModel",
        2,
        *BIAS,
        implementations=False,
        overrides=DENSE_FIRST | {"sliding_window": 4},
    ),
    _family(
        "zaya/text",
        "ZayaForCausalLM",
        3,
        "skip-is-zero-weight",
        *BIAS,
        k=None,
        seed=1,
        overrides={"num_experts_per_tok": 1},
    ),
)

UNUSUAL = (
    _family("gemma4/text", "Gemma4ForCausalLM", 3, "probs-not-logits", overrides=GEMMA_MOE),
    _family(
        "diffusion_gemma/encoder",
        "DiffusionGemmaEncoderTextModel",
        3,
        "probs-not-logits",
        overrides=GEMMA_MOE,
    ),
    _family(
        "dots3_note/vision",
        "Dots3NoteVisionModel",
        2,
        *BIAS,
        inputs=patch_inputs,
        overrides=DENSE_FIRST,
        note="routes image patches; the bias lies on the block",
    ),
    _family("ernie4_5_vl_moe/text", "Ernie4_5_VLMoeTextModel", 2, *BIAS, overrides=ERNIE),
    _family(
        "ernie4_5_vl_moe/mixed",
        "Ernie4_5_VLMoeTextModel",
        4,
        "several-routers",
        "ragged",
        *BIAS,
        inputs=vision_token_inputs,
        overrides=ERNIE,
        note="text and image tokens go to different routers of one layer",
    ),
    _family(
        "doge/text",
        "DogeForCausalLM",
        3,
        contract="product-key",
        implementations=False,
        overrides={"is_moe": True, "num_experts": 16},
    ),
    _family(
        "jetmoe/text",
        "JetMoeForCausalLM",
        6,
        "several-routers",
        contract="sorted-dispatch",
        implementations=False,
    ),
    _family(
        "llama4/text",
        "Llama4ForCausalLM",
        3,
        "dense-compute",
        "scaled-input",
        contract="dense-scores",
        implementations=False,
    ),
    _family(
        "nllb_moe/seq2seq",
        "NllbMoeForConditionalGeneration",
        2,
        "defect",
        contract="one-hot",
        k=None,
        overrides={"encoder_sparse_step": 2, "decoder_sparse_step": 2},
        implementations=False,
    ),
    _family(
        "switch_transformers/seq2seq",
        "SwitchTransformersForConditionalGeneration",
        2,
        contract="one-hot",
        k=1,
        implementations=False,
    ),
    _family(
        "switch_transformers/dropping",
        "SwitchTransformersForConditionalGeneration",
        2,
        "drops-tokens",
        contract="one-hot",
        k=None,
        overrides={"expert_capacity": 1},
        note="a token over the capacity is left out, so k is 1 or 0",
        implementations=False,
    ),
    _family(
        "switch_transformers/encoder",
        "SwitchTransformersEncoderModel",
        1,
        contract="one-hot",
        k=1,
        implementations=False,
    ),
    _family(
        "vitpose_backbone/vision",
        "VitPoseBackbone",
        3,
        "no-router",
        contract="none",
        k=1,
        inputs=image_inputs,
        overrides={"num_experts": 4, "part_features": 16},
        implementations=False,
    ),
)

COMPOSITE = (
    _family("aria/composite", "AriaForConditionalGeneration", 3),
    _family(
        "deepseek_ocr2/composite",
        "DeepseekOcr2ForConditionalGeneration",
        2,
        overrides={"text_config": DENSE_FIRST | {"num_experts_per_tok": 2}},
    ),
    _family(
        "diffusion_gemma/composite",
        "DiffusionGemmaForBlockDiffusion",
        6,
        "probs-not-logits",
        inputs=canvas_inputs,
        overrides={"text_config": GEMMA_MOE, "canvas_length": 8},
    ),
    _family(
        "dots3_note/composite",
        "Dots3NoteForConditionalGeneration",
        2,
        *BIAS,
        overrides={"vision_config": DENSE_FIRST, "text_config": NO_SLIDING},
    ),
    _family(
        "ernie4_5_vl_moe/composite",
        "Ernie4_5_VLMoeForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": ERNIE},
    ),
    _family(
        "gemma4/composite",
        "Gemma4ForConditionalGeneration",
        3,
        "probs-not-logits",
        overrides={"text_config": GEMMA_MOE},
    ),
    _family(
        "glm4v_moe/composite",
        "Glm4vMoeForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": GLM_MROPE},
    ),
    _family(
        "glm5_next/composite",
        "Glm5NextForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": LATENT_DENSE_FIRST},
    ),
    _family(
        "inkling/composite",
        "InklingForConditionalGeneration",
        3,
        *BIAS,
        overrides={"vision_config": {"num_hidden_layers": 6, "patch_size": 4}},
    ),
    _family("inkling2/composite", "Inkling2ForConditionalGeneration", 3, *BIAS),
    _family(
        "llama4/composite",
        "Llama4ForConditionalGeneration",
        1,
        "dense-compute",
        "scaled-input",
        contract="dense-scores",
        overrides={"text_config": {"moe_layers": [1]}},
        implementations=False,
    ),
    _family("minimax_m3_vl/composite", "MiniMaxM3SparseForConditionalGeneration", 3, *BIAS),
    _family("mistral_large4/composite", "MistralLarge4ForConditionalGeneration", 2, *BIAS),
    _family(
        "muse_spark/composite",
        "MuseSparkForConditionalGeneration",
        3,
        *BIAS,
        overrides={
            "audio_config": {
                "num_hidden_layers": 2,
                "patch_sizes": [4, 4],
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
            }
        },
    ),
    _family(
        "qwen3_5_moe/composite", "Qwen3_5MoeForConditionalGeneration", 3, overrides={"text_config": HYBRID}
    ),
    _family(
        "qwen3_omni_moe/thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        3,
        overrides={"text_config": MROPE, "vision_start_token_id": 110},
        note="its config lacks vision_start_token_id, which its forward reads",
    ),
    _family(
        "qwen3_omni_moe/talker",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        3,
        inputs=embedding_inputs,
        overrides=TALKER,
        generates=False,
    ),
    _family(
        "qwen3_omni_moe/whole",
        "Qwen3OmniMoeForConditionalGeneration",
        3,
        entry="thinker",
        overrides={
            "thinker_config": {"text_config": MROPE, "vision_start_token_id": 110},
            "talker_config": TALKER,
        },
        note="thinker and talker in one model, which has no forward of its own",
    ),
    _family(
        "qwen3_vl_moe/composite", "Qwen3VLMoeForConditionalGeneration", 3, overrides={"text_config": MROPE}
    ),
    _family(
        "qwen4_exp/composite",
        "Qwen4ExpForConditionalGeneration",
        3,
        overrides={"text_config": HYBRID | INDEXER},
    ),
    _family(
        "step3p7/composite",
        "Step3p7ForConditionalGeneration",
        2,
        *BIAS,
        implementations=False,
        overrides={"text_config": DENSE_FIRST | {"sliding_window": 4}},
    ),
    _family("unlimited_ocr/composite", "UnlimitedOcrForConditionalGeneration", 2),
)

WRAPPED = (
    _family(
        "llava/mixtral",
        "LlavaForConditionalGeneration",
        3,
        overrides={"text_config": {"model_type": "mixtral"}},
    ),
    _family("kimi_k25/composite", "Kimi_K25ForConditionalGeneration", 2, *BIAS),
    _family(
        "nemotron_h_omni/composite",
        "NemotronH_Omni_Reasoning_V3",
        1,
        *BIAS,
        overrides={
            "vision_config": {"video_temporal_patch_size": 2},
            "audio_config": {"projection_hidden_size": 64, "projection_bias": False},
        },
    ),
)
"""Families without experts of their own that hold the text model of another one."""

FAMILIES: tuple[Family, ...] = (*TOP_K_OF_LOGITS, *GROUPED, *BIASED, *UNUSUAL, *COMPOSITE, *WRAPPED)
BY_NAME = MappingProxyType({family.name: family for family in FAMILIES})
