#!/usr/bin/env python3
"""Write docs/models.md: what is recorded of every Mixture-of-Experts family of the installed transformers.

    python scripts/list_models.py            write the file
    python scripts/list_models.py --check    only check whether it is up to date (exit code 1 if not)

A tiny model of each family of the test bench is built, run once and traced. The table therefore shows what is
really recorded.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import torch
import transformers
from torch import nn

import moe_trace
from families.configs import FAMILIES
from families.dense import LOOKALIKES
from families.family import Family, find_model_class
from moe_trace.data.display.tables import scaled
from moe_trace.data.schema import RouterInfo
from moe_trace.find.registry import CONTRACTS

DOCUMENT = REPOSITORY / "docs" / "models.md"

COMPARED = {
    "olmoe": ("OlmoeForCausalLM", "softmax over all experts, top-k of it, not renormalised"),
    "mixtral": ("MixtralForCausalLM", "softmax over all experts, top-k of it, renormalised to 1"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "as Mixtral, if `norm_topk_prob`"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "sigmoid + bias, best groups first, top-k in them, × 2.5"),
    "gpt_oss": ("GptOssForCausalLM", "top-k of the logits, softmax over the chosen"),
    "dbrx": ("DbrxForCausalLM", "softmax over all experts, top-k of it, renormalised"),
    "llama4": ("Llama4ForCausalLM", "top-k of the logits, a sigmoid scales the experts' input"),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        "argmax of the softmax, while the expert has room",
    ),
}
"""Family -> class, and its selection rule (from its source)."""
RELEASED: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 1024},
    "dbrx": {
        "d_model": 6144,
        "attn_config": {"clip_qkv": 8.0, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
}
"""Changes where the default config differs from the released model. DBRX's default cannot even be built."""
REDUCED_LAYERS = {"num_hidden_layers": 4, "num_layers": 2, "num_decoder_layers": 2, "n_layers": 2}
"""Layer counts for the comparison. A few are enough, since a family's MoE layers are all alike."""


@dataclass(frozen=True)
class Row:
    """One kind of router of a family."""

    family: str
    info: RouterInfo
    selects_in: str
    has_logits: bool
    called: bool


def trace_family(family: Family) -> list[Row]:
    """Return each kind of router of a family once, as recorded in a traced forward."""
    model = family.build()
    tracer = moe_trace.MoETracer(model)
    selects: dict[str, str] = {}
    handles = [
        site.router.register_forward_hook(_remember(selects, site.name, family)) for site in tracer.sites
    ]
    with tracer:
        family.run(model)
    for handle in handles:
        handle.remove()
    logits = {s.name: s.router_entropy is not None for s in tracer.samples()}
    kinds: dict[tuple[str, str], Row] = {}
    for info in tracer.recording().routers:
        where, has_logits = selects.get(info.name, "-"), logits.get(info.name, False)
        row = Row(family.folder, info, where, has_logits, info.name in logits)
        kinds.setdefault((info.router_class, info.experts_class or ""), row)
    return [row for row in kinds.values() if row.called]


def _remember(selects: dict[str, str], name: str, family: Family) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        selects[name] = "block" if isinstance(output, torch.Tensor) else "router"

    return hook


def family_rows() -> list[Row]:
    """Return the kinds of routers of every family, by name, without variants that repeat a kind."""
    rows: dict[tuple[str, str], Row] = {}
    for family in FAMILIES:
        if "no-router" not in family.traits:
            for row in trace_family(family):
                rows.setdefault((row.family, row.info.router_class), row)
    return [rows[key] for key in sorted(rows)]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar inside a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def families_section(rows: Sequence[Row]) -> str:
    headings = ("family", "router", "experts", "adapter", "logit figures", "what to know")
    table = markdown_table(
        headings,
        (
            (
                row.family,
                f"`{row.info.router_class}`",
                f"`{row.info.experts_class}`",
                row.info.contract,
                "yes" if row.has_logits else "no",
                "; ".join((*_selection(row), *map(_without_sizes, row.info.notes))) or "",
            )
            for row in rows
        ),
    )
    missing = sorted(family.folder for family in FAMILIES if "no-router" in family.traits)
    return (
        f"{len({row.family for row in rows})} families, {len(rows)} kinds of routers. Of each call of each:\n"
        "tokens, assignments of each expert, skipped slots, slots per token, padding, host and device time,\n"
        "FLOPs of router, experts and shared experts. *Logit figures* are entropy, confidence, top-1\n"
        "probability, top-k mass and z-loss; where there are none, there are no logits that decide.\n\n"
        f"{table}\n\n"
        f"Experts without a router, of which nothing is recorded: {', '.join(missing)} (the caller says "
        "which expert an image belongs to)."
    )


def _selection(row: Row) -> list[str]:
    """Return notes on where the logits alone would be misleading."""
    if row.selects_in == "block" and row.info.contract == "topk-experts":
        return ["the block selects, not the router"]
    traits = {trait for family in FAMILIES if family.folder == row.family for trait in family.traits}
    notes = []
    if "selection-bias" in traits and row.has_logits:
        notes.append("a bias or groups take part, so it is not the top-k of the logits")
    if "drops-tokens" in traits:
        notes.append("tokens over an expert's capacity are skipped")
    return notes


def _without_sizes(note: str) -> str:
    """Return a note without the sizes of the test bench, which no released model has."""
    if "work on every token too" in note:
        return note.partition(" work on")[0] + ": dense work round the experts, in none of these figures"
    if note.startswith("the last "):
        return "the last of the experts are identities: assignments without FLOPs"
    if "logits: the last means" in note:
        return "one more" + note[note.index(" logits") :].replace("logits:", "logit than experts:")
    return note


def contracts_section() -> str:
    rows = ((contract.name, f"`{contract.description}`") for contract in CONTRACTS)
    return markdown_table(("adapter", "how router and experts speak"), rows)


def comparison_section() -> str:
    headings = ("family", "router", "selects in", "how", "E", "k", "adapter", "shared", "experts", "FLOPs")
    rows = []
    for folder, (class_name, how) in COMPARED.items():
        info, selects_in = default_router(folder, class_name)
        slots = info.num_experts if info.every_expert_computes else info.top_k
        cells = (
            folder,
            f"`{info.router_class}`",
            selects_in,
            how,
            str(info.num_experts),
            str(info.top_k),
            info.contract,
            scaled(info.parameters["shared"]) if info.parameters["shared"] else "-",
            scaled(info.parameters["experts"]),
            scaled(slots * info.expert_flops_per_slot),
        )
        rows.append(cells)
    return markdown_table(headings, rows)


def default_router(folder: str, class_name: str) -> tuple[RouterInfo, str]:
    """Return the first router of the family's default config, built without weights, and where it selects."""
    model_class = find_model_class(folder, class_name)
    config = model_class.config_class(**RELEASED.get(folder, {}))
    for field, layers in REDUCED_LAYERS.items():
        if hasattr(config, field):
            setattr(config, field, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        model = model_class(config)
    in_block = any(hasattr(module, "route_tokens_to_experts") for module in model.modules())
    return moe_trace.find_routers(model)[0].info, "block" if in_block else "router"


def lookalikes_section() -> str:
    rows = [(family.folder, family.note) for family in LOOKALIKES]
    return markdown_table(("family", "what it is"), rows)


def document() -> str:
    """Return the text of docs/models.md."""
    return f"""# Models

Generated by `scripts/list_models.py` from transformers {transformers.__version__}: every family is built
tiny, run once and traced. A test holds the recorded assignments of each against an intervention on the
weights (scale one expert, see which rows move). A family that is not here needs nothing, if its experts are
called as one of the adapters says; else [teach it](custom_routers.md). Versions stand in tables that are
made by running them: of transformers 5 in [versions.md](versions.md), of transformers 4, torchtitan,
OLMo-core, NeMo Automodel, Megatron-core and DeepSpeed in [frameworks.md](frameworks.md).

## Families

{families_section(family_rows())}

## Adapters

{contracts_section()}

## OLMoE beside others

One MoE layer of each family's best known model (OLMoE-1B-7B, Mixtral 8x7B, Qwen3-30B-A3B, DeepSeek-V3,
gpt-oss-120b, DBRX, Llama 4 Scout, switch-base-8), without weights: E experts, k per token,
parameters of the shared and of all routed experts, FLOPs of the routed experts for one token.

{comparison_section()}

OLMoE's router is the plainest: one matrix, softmax, top-k, and the weights stay as the softmax gave them, so
that they do not sum to 1 and `topk_mass` is their sum. In all families but DBRX the router module itself
selects, and in nearly all the experts module is then handed the index [T, K]: that call is the truth about
the routing, whatever biases, groups or tables led to it.

## No Mixture of Experts, though it sounds like one

Nothing is found in these, and nothing should be.

{lookalikes_section()}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check whether the file is up to date")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # with tiny tensors, more threads only wait for each other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = document()
    if not arguments.check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    if DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    print(f"{DOCUMENT} is out of date: run python scripts/list_models.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
