"""Load the model of a run: the embedded demo, a hub id, a folder, or a config with random weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_trace.data.errors import MoETraceError, UsageError
from moe_trace.demo import demo_path, load_demo_model


class ModelError(MoETraceError):
    """A model could not be loaded, or failed in its own forward."""

    exit_code = 7


_NOT_LOADED = (
    "cannot load the model {source!r}: {why}. Expected `demo`, a folder that save_pretrained wrote, the id "
    "of a model on the hub (which needs the network), or a config.json with --random-weights"
)


def choose_device(name: str) -> torch.device:
    """Return a device; `auto` selects the GPU if there is one.

    Raises:
        UsageError: the name is not valid, or a GPU was requested and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    return device


def load_model(
    source: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    random_weights: bool = False,
    distributed_config: Any = None,
    top_k: int | None = None,
    experts_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    """Return the model, in eval mode, and its tokenizer or None.

    Args:
        source: `demo`, a hub id, a folder with weights, or the path of a config.json.
        device: device to build the model on; `meta` with `random_weights` allocates no weights at all.
        random_weights: build from the config alone.
        distributed_config: transformers' own, to load only this process's part of the weights.
        top_k, experts_implementation: override the config.

    Raises:
        ModelError: the model cannot be loaded; the message says what was tried.
        UsageError: a config without weights was given without `random_weights`.
    """
    path = str(demo_path()) if source == "demo" else source
    split = {} if distributed_config is None else {"distributed_config": distributed_config}
    try:
        config = _config(path, top_k, random_weights=random_weights)
        if source == "demo" and not random_weights:
            model, tokenizer = load_demo_model(device, dtype, config=config, **split)
        elif random_weights:
            model, tokenizer = _random_model(config, torch.device(device), dtype), load_tokenizer(path)
        else:
            options = {"config": config, "dtype": dtype or "auto", **split}
            model = _model_class(config).from_pretrained(path, **options).to(device)
            tokenizer = load_tokenizer(path)
        return _with_experts(model.eval(), experts_implementation), tokenizer
    except UsageError:
        raise
    except Exception as error:  # a bad config can raise anything in a model's code
        raise ModelError(_NOT_LOADED.format(source=source, why=_first_line(error))) from error


def _config(source: str, top_k: int | None, *, random_weights: bool) -> Any:
    import transformers

    if source.endswith(".json"):
        if not random_weights:
            raise UsageError(f"{source} is a config and holds no weights; add --random-weights")
        values = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError("the config has no `model_type`")
    # Reads a config.json again, since it also decodes what JSON cannot represent: infinity.
    return _with_top_k(transformers.AutoConfig.from_pretrained(source), top_k)


def _random_model(config: Any, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    torch.manual_seed(0)
    with device:
        model: nn.Module = _model_class(config)(config)
    return model if dtype is None else model.to(dtype)


_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_topk", "top_k")


def _with_top_k(config: Any, top_k: int | None) -> Any:
    """Return the config with another number of experts per token.

    Raises:
        UsageError: the config has no such number, or fewer experts.
    """
    if top_k is None:
        return config
    text = config.get_text_config()
    key = next((name for name in _TOP_K if isinstance(getattr(text, name, None), int)), None)
    if key is None:
        raise UsageError(f"--top-k: the config {type(config).__name__} has none of {', '.join(_TOP_K)}")
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)
    if experts is not None and top_k > experts:
        raise UsageError(
            f"found --top-k {top_k}, but the model has {experts} experts; give at most {experts}"
        )
    setattr(text, key, top_k)
    return config


def _with_experts(model: nn.Module, implementation: str | None) -> nn.Module:
    """Return the model with another implementation of its experts.

    Raises:
        UsageError: the model does not support it.
    """
    if implementation is None:
        return model
    choose = getattr(model, "set_experts_implementation", None)
    if choose is None:
        raise UsageError("--experts-implementation: this model, or this transformers, knows one way only")
    try:
        choose(implementation)
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--experts-implementation {implementation}: {_first_line(error)}") from error
    return model


def _model_class(config: Any) -> Any:
    """Return the class named by the config, else of its first auto class: generation before encoding."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for mapping in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    ):
        if type(config) in mapping._model_mapping:
            found = mapping._model_mapping[type(config)]
            # Some composite configs are mapped to the class of their text model, which takes another config.
            if found.config_class is type(config):
                return found
    part = _class_of_a_part(config)
    if part is None:
        raise ValueError(f"transformers has no model for the config {type(config).__name__}")
    return part


def _class_of_a_part(config: Any) -> Any:
    """Return a class for the config of a part, such as a composite's text model, unknown to auto classes."""
    import transformers

    package, _, module_name = type(config).__module__.rpartition(".")
    if not module_name.startswith("configuration_"):
        return None
    modeling = importlib.import_module(f"{package}.{module_name.replace('configuration_', 'modeling_')}")
    classes: list[Any] = [value for value in vars(modeling).values() if isinstance(value, type)]
    fitting = [
        cls
        for cls in classes
        if issubclass(cls, transformers.PreTrainedModel)
        and cls.config_class is type(config)
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    return max(fitting, key=lambda cls: (cls.can_generate(), "TextModel" in cls.__name__), default=None)


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer of a model, or None if it has none."""
    import transformers

    if source.endswith(".json"):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None  # a folder without a tokenizer: random tokens are used


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def hide_progress_bars() -> None:
    """Hide the progress bars that transformers draws while it loads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
