"""Composite models: text models with experts inside models of images, sound and several parts."""

from .inputs import canvas_inputs, embedding_inputs
from .variants import (
    BIAS,
    DENSE_FIRST,
    ERNIE,
    GEMMA_MOE,
    GLM_MROPE,
    HYBRID,
    INDEXER,
    LATENT_DENSE_FIRST,
    MROPE,
    NO_SLIDING,
    QWEN_DENSE_FIRST,
    TALKER,
    variant,
)

COMPOSITE = (
    variant("aria/composite", "AriaForConditionalGeneration", 3),
    variant(
        "deepseek_ocr2/composite",
        "DeepseekOcr2ForConditionalGeneration",
        2,
        overrides={"text_config": DENSE_FIRST | {"num_experts_per_tok": 2}},
    ),
    variant(
        "diffusion_gemma/composite",
        "DiffusionGemmaForBlockDiffusion",
        6,
        "probs-not-logits",
        inputs=canvas_inputs,
        overrides={"text_config": GEMMA_MOE, "canvas_length": 8},
    ),
    variant(
        "dots3_note/composite",
        "Dots3NoteForConditionalGeneration",
        2,
        *BIAS,
        overrides={"vision_config": DENSE_FIRST, "text_config": NO_SLIDING},
    ),
    variant(
        "ernie4_5_vl_moe/composite",
        "Ernie4_5_VLMoeForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": ERNIE},
    ),
    variant(
        "gemma4/composite",
        "Gemma4ForConditionalGeneration",
        3,
        "probs-not-logits",
        overrides={"text_config": GEMMA_MOE},
    ),
    variant(
        "glm4v_moe/composite",
        "Glm4vMoeForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": GLM_MROPE},
    ),
    variant(
        "glm5_next/composite",
        "Glm5NextForConditionalGeneration",
        2,
        *BIAS,
        overrides={"text_config": LATENT_DENSE_FIRST},
    ),
    variant(
        "hy_v4_vl/composite",
        "HYV4VLForConditionalGeneration",
        2,
        *BIAS,
        overrides={
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            }
        },
    ),
    variant(
        "inkling/composite",
        "InklingForConditionalGeneration",
        3,
        *BIAS,
        overrides={"vision_config": {"num_hidden_layers": 6, "patch_size": 4}},
    ),
    variant("inkling2/composite", "Inkling2ForConditionalGeneration", 3, *BIAS),
    variant("inkling2_loop/composite", "Inkling2LoopForConditionalGeneration", 3, *BIAS),
    variant(
        "llama4/composite",
        "Llama4ForConditionalGeneration",
        1,
        "dense-compute",
        "scaled-input",
        contract="dense-scores",
        overrides={"text_config": {"moe_layers": [1]}},
        implementations=False,
        broken_in=frozenset({"5.24.0"}),
        note="5.24.0 asks the text model's output for image_outputs, which it has not",
    ),
    variant("minimax_m3_vl/composite", "MiniMaxM3SparseForConditionalGeneration", 3, *BIAS),
    variant("mistral_large4/composite", "MistralLarge4ForConditionalGeneration", 2, *BIAS),
    variant(
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
    variant(
        "qwen3_5_moe/composite", "Qwen3_5MoeForConditionalGeneration", 3, overrides={"text_config": HYBRID}
    ),
    variant(
        "qwen3_omni_moe/thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        3,
        overrides={"text_config": MROPE, "vision_start_token_id": 110},
        note="its config lacks vision_start_token_id, which its forward reads",
    ),
    variant(
        "qwen3_omni_moe/talker",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        3,
        inputs=embedding_inputs,
        overrides=TALKER,
        generates=False,
    ),
    variant(
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
    variant(
        "qwen3_vl_moe/composite",
        "Qwen3VLMoeForConditionalGeneration",
        2,
        overrides={"text_config": MROPE | QWEN_DENSE_FIRST},
    ),
    variant(
        "qwen4_exp/composite",
        "Qwen4ExpForConditionalGeneration",
        3,
        overrides={"text_config": HYBRID | INDEXER},
    ),
    variant(
        "step3p7/composite",
        "Step3p7ForConditionalGeneration",
        2,
        *BIAS,
        implementations=False,
        overrides={"text_config": DENSE_FIRST | {"sliding_window": 4}},
    ),
    variant("unlimited_ocr/composite", "UnlimitedOcrForConditionalGeneration", 2),
)

WRAPPED = (
    variant(
        "llava/mixtral",
        "LlavaForConditionalGeneration",
        3,
        overrides={"text_config": {"model_type": "mixtral"}},
    ),
    variant("kimi_k25/composite", "Kimi_K25ForConditionalGeneration", 2, *BIAS),
    variant(
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
