"""Models without a Mixture of Experts: nothing may be found in them, whatever their parts are called."""

from types import MappingProxyType
from typing import Any

from .family import Family
from .variants import HYBRID, LATENT_DENSE_FIRST

LINEAR_DENSE: dict[str, Any] = HYBRID | {"mlp_layer_types": ["dense"] * 3}
LATENT_DENSE: dict[str, Any] = LATENT_DENSE_FIRST | {"mlp_layer_types": ["dense"] * 3}


def _dense(name: str, model: str, note: str = "", **overrides: Any) -> Family:
    frozen = MappingProxyType(overrides)
    return Family(name=name, model=model, calls=0, k=None, contract="none", overrides=frozen, note=note)


PLAIN = (
    _dense("albert/dense", "AlbertForMaskedLM"),
    _dense("bart/dense", "BartForConditionalGeneration"),
    _dense("bert/dense", "BertForMaskedLM"),
    _dense("bloom/dense", "BloomForCausalLM"),
    _dense("clip/dense", "CLIPModel"),
    _dense("cohere2/dense", "Cohere2ForCausalLM"),
    _dense("distilbert/dense", "DistilBertForMaskedLM"),
    _dense("falcon/dense", "FalconForCausalLM"),
    _dense("gemma2/dense", "Gemma2ForCausalLM"),
    _dense("gemma3/dense", "Gemma3ForCausalLM"),
    _dense("gpt2/dense", "GPT2LMHeadModel"),
    _dense("gpt_neox/dense", "GPTNeoXForCausalLM"),
    _dense("granite/dense", "GraniteForCausalLM"),
    _dense("llama/dense", "LlamaForCausalLM"),
    _dense("llava/dense", "LlavaForConditionalGeneration"),
    _dense("mamba2/dense", "Mamba2ForCausalLM", num_heads=8),
    _dense("mistral/dense", "MistralForCausalLM"),
    _dense("modernbert/dense", "ModernBertForMaskedLM"),
    _dense("olmo2/dense", "Olmo2ForCausalLM"),
    _dense("opt/dense", "OPTForCausalLM"),
    _dense("phi3/dense", "Phi3ForCausalLM"),
    _dense("qwen2/dense", "Qwen2ForCausalLM"),
    _dense("qwen3/dense", "Qwen3ForCausalLM"),
    _dense("roberta/dense", "RobertaForMaskedLM"),
    _dense("smollm3/dense", "SmolLM3ForCausalLM"),
    _dense("t5/dense", "T5ForConditionalGeneration"),
    _dense("vit/dense", "ViTModel"),
    _dense("wav2vec2/dense", "Wav2Vec2Model"),
    _dense("whisper/dense", "WhisperForConditionalGeneration"),
)

LOOKALIKES = (
    _dense("bamba/gate", "BambaForCausalLM", "num_experts = 1 in its code, which is never used"),
    _dense("d_fine/gate", "DFineForObjectDetection", "Gate fuses two streams"),
    _dense("deimv2/gate", "Deimv2ForObjectDetection", "Gate fuses two streams"),
    _dense(
        "gemma3n/router",
        "Gemma3nForCausalLM",
        "modality_router weighs the streams of AltUp",
        num_kv_shared_layers=0,
    ),
    _dense(
        "gemma4_unified/flag", "Gemma4UnifiedForConditionalGeneration", "output_router_logits without routers"
    ),
    _dense(
        "granite_docling/router",
        "GraniteDoclingForConditionalGeneration",
        "DensityRouter: one logit a sample",
    ),
    _dense(
        "kyutai_speech_to_text/gating",
        "KyutaiSpeechToTextForConditionalGeneration",
        "GatingMLP",
        codec_config={"upsample_groups": 64},
    ),
    _dense("moshi/gating", "MoshiForCausalLM", "GatingMLP"),
    _dense("olmo_hybrid/gate", "OlmoHybridForCausalLM", "gated delta net"),
    _dense("pi0/expert", "PI0ForConditionalGeneration", "the action expert is a second transformer"),
    _dense("qwen3_5/gate", "Qwen3_5ForCausalLM", "gated delta net", **HYBRID),
    _dense("recurrent_gemma/gate", "RecurrentGemmaForCausalLM", "recurrent gates"),
)

WITHOUT_EXPERTS = (
    _dense("bailing_hybrid/no_experts", "BailingHybridForCausalLM", "ForgetGate", **LINEAR_DENSE),
    _dense("deepseek_v3/no_experts", "DeepseekV3ForCausalLM", first_k_dense_replace=3),
    _dense("doge/no_experts", "DogeForCausalLM", is_moe=False),
    _dense("gemma4/no_experts", "Gemma4ForCausalLM", "enable_moe_block is off by default"),
    _dense("glm5_next/no_experts", "Glm5NextTextModel", "ForgetGate", **LATENT_DENSE),
    _dense("granitemoehybrid/no_experts", "GraniteMoeHybridForCausalLM", num_local_experts=0, **HYBRID),
    _dense("jamba/no_experts", "JambaForCausalLM", num_experts=1, attn_layer_period=2, attn_layer_offset=0),
    _dense("kimi_linear/no_experts", "KimiLinearForCausalLM", "ForgetGate", **LINEAR_DENSE),
    _dense("muse_spark/no_experts", "MuseSparkTextModel", "ResidualGate", mlp_layer_types=["dense"] * 3),
    _dense("qwen3_moe/no_experts", "Qwen3MoeForCausalLM", mlp_only_layers=[0, 1, 2]),
)
"""Families of the bench, configured so that no layer has experts."""

DENSE: tuple[Family, ...] = (*PLAIN, *LOOKALIKES, *WITHOUT_EXPERTS)
