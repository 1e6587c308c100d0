"""Entry of the test bench: how to build a family's model, its inputs, and its special traits."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .randomise import randomise, undrawn_memory_is_nan
from .shrink import FIRST_SPECIAL_ID, TOP_K, shrunk_config

BATCH = 2
LENGTH = 7
PAD_ID = 0

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One tiny random model of the bench."""

    name: str
    """``family/variant``; the family is the name of the folder below ``transformers.models``."""
    model: str
    """The model's class."""
    calls: int
    """How many times a forward calls a block of experts."""
    k: int | None = TOP_K
    """(token, expert) pairs a token at every call; ``None`` where it depends on the token."""
    contract: str = "topk-experts"
    """``topk-experts``, ``one-hot``, ``dense-scores``, ``sorted-dispatch``, ``product-key`` or ``none``."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Config fields that the generic shrinking leaves wrong, nested under the names of the sub-configs."""
    entry: str = ""
    """The submodule that is called, where the model itself has no forward."""
    inputs: Callable[[transformers.PretrainedConfig, str | None], Inputs] | None = None
    """Draws the inputs, where token ids are not enough. Arguments: config, padding."""
    implementations: bool = True
    """Whether its experts can compute in other ways than eagerly; see ``use_experts``."""
    generates: bool = True
    """False where ``generate`` needs more than the inputs of a forward."""
    seed: int = 0
    """Of the weights, chosen so that what is special about the family does happen."""
    traits: frozenset[str] = frozenset()
    """What a reader of this router must know; see TRAITS."""
    broken_in: frozenset[str] = frozenset()
    """Releases of transformers in which its own forward raises, with or without moe_trace."""
    note: str = ""
    """Why this variant is in the bench."""

    @property
    def folder(self) -> str:
        return self.name.split("/")[0]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return find_model_class(self.folder, self.model)

    @property
    def config(self) -> transformers.PretrainedConfig:
        return shrunk_config(self.model_class.config_class, dict(self.overrides))

    @property
    def encoder_decoder(self) -> bool:
        return self.model_class.config_class().is_encoder_decoder and "Encoder" not in self.model

    @property
    def can_generate(self) -> bool:
        return self.generates and not self.entry and self.model_class.can_generate()

    def build(self) -> PreTrainedModel:
        """The model, in eval mode, the same at every call."""
        with torch.random.fork_rng(devices=[]), undrawn_memory_is_nan():
            torch.manual_seed(self.seed)
            model = self.model_class(self.config).eval()
        randomise(model, self.seed)
        return model

    def make_inputs(self, padding: str | None = None) -> Inputs:
        """Keyword arguments of a forward; ``padding`` is ``None``, ``"left"`` or ``"right"``."""
        draw_inputs = self.inputs or (encoder_decoder_inputs if self.encoder_decoder else text_inputs)
        return draw_inputs(self.config, padding)

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Any:
        """One forward without gradients."""
        with torch.no_grad():
            return model.get_submodule(self.entry)(**(inputs or self.make_inputs()))


TRAITS = MappingProxyType(
    {
        "probs-not-logits": "element 0 of the router's output holds softmax probabilities",
        "skip-is-zero-weight": "index 0 with weight exactly 0 means that the token skips the experts",
        "identity-experts": "the last indices are experts without weights",
        "drops-tokens": "a token over the capacity of its expert gets none",
        "defect": "what runs is not what the router declares",
        "dense-compute": "every expert computes every token",
        "scaled-input": "the scores scale the experts' input, not their output",
        "hash": "the choice does not depend on the logits",
        "several-routers": "a layer holds more than one router",
        "ragged": "the tokens of a call are a subset of the batch",
        "selection-bias": "the choice is not the top-k of the logits alone",
        "no-router": "experts without a router",
    }
)


def use_experts(model: nn.Module, implementation: str) -> bool:
    """Choose ``eager``, ``grouped_mm`` or ``batched_mm``; False where the family computes in one way only.

    Not ``set_experts_implementation``: that refuses wrappers round a model of another family, and changes the
    config of dots3_note's vision model but not the copies that its layers read.
    """
    chosen = False
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            config: Any = module.config
            config._experts_implementation = implementation
            chosen = True
    return chosen


def find_model_class(folder: str, class_name: str) -> type[PreTrainedModel]:
    """A model class by name, also where transformers does not export it."""
    package = importlib.import_module(f"transformers.models.{folder}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("modeling_"):
            found = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), class_name, None)
            if found is not None:
                return found
    raise LookupError(f"transformers.models.{folder} has no class {class_name}")


def token_ids(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens [batch, length]: none is padding, begin, end or a placeholder."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, FIRST_SPECIAL_ID, (batch, length), generator=draw)


def text_inputs(config: transformers.PretrainedConfig, padding: str | None = None) -> Inputs:
    """Token ids and their mask. Of the second row, three tokens are padding."""
    input_ids = token_ids()
    mask = torch.ones_like(input_ids)
    if padding:
        padded = slice(0, 3) if padding == "left" else slice(-3, None)
        input_ids[-1, padded] = PAD_ID
        mask[-1, padded] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def encoder_decoder_inputs(config: transformers.PretrainedConfig, padding: str | None = None) -> Inputs:
    """Five decoder tokens a row, so that encoder and decoder calls differ in size."""
    return text_inputs(config, padding) | {"decoder_input_ids": token_ids(length=5, seed=1)}
