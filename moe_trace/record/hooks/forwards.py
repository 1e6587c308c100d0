"""What the model's own hooks know of its forwards: stage, padding, and which forward a thread is in."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.data.schema import Stage
from moe_trace.find.private.torch_names import in_backward

_CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


@dataclass(slots=True)
class ForwardContext:
    """What the model's own hooks know of the forward under way."""

    step: int
    stage: Stage
    padding_T: Tensor | None = None
    epoch: int = 0
    """Forwards of the model that the host has seen; orders samples that have no time."""
    recorded: bool = True
    """False for a step left out by `every` or `warmup`, whose hooks may be on for another thread's sake."""
    of_model: bool = True
    """False for a router called outside any forward of the model: through a submodule."""
    thread: int = field(default_factory=threading.get_native_id)
    """Native id of the thread that runs it."""


class ForwardStack:
    """The forwards of the model that are under way, per thread, innermost last."""

    def __init__(self) -> None:
        self._stacks: dict[int, list[ForwardContext]] = {}
        self._last: ForwardContext | None = None

    def enter(self, context: ForwardContext) -> None:
        """The model's forward begins on this thread."""
        self._stacks.setdefault(threading.get_ident(), []).append(context)
        self._last = context

    def leave(self) -> bool:
        """The model's forward is over; returns whether the thread is in none any more."""
        stack = self._stacks.get(threading.get_ident())
        if stack:
            stack.pop()
        if not stack:
            self._stacks.pop(threading.get_ident(), None)
        return not stack

    def current(self) -> ForwardContext | None:
        """The forward of this thread; for a recomputation in the backward, the last one that began."""
        stack = self._stacks.get(threading.get_ident())
        if stack:
            return stack[-1]
        return self._last if in_backward() else None

    def clear(self) -> None:
        """Forget all of them."""
        self._stacks.clear()
        self._last = None


class ModelInputs:
    """Reads stage and padding from the arguments of the model's forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._positions = {name: i for i, name in enumerate(_parameter_names(model))}
        config = getattr(unwrapped(model), "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))

    def length(self, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Tokens per row of the model's input; of the decoder's, where there is one."""
        names = ("input_ids", "inputs_embeds")
        if self._encoder_decoder:
            names = ("decoder_input_ids", "decoder_inputs_embeds")
        for name in names:
            tokens = self._given(args, kwargs, name)
            if isinstance(tokens, Tensor) and tokens.dim() >= 2:
                return int(tokens.shape[1])
        return None

    def stage(self, args: Any, kwargs: dict[str, Any]) -> Stage:
        """`decode` for one token a row that follows what a cache holds."""
        if torch.is_grad_enabled() and self._model.training:
            return "train"
        if self.length(args, kwargs) != 1:
            return "prefill"
        cached = _cached_tokens(self._cache(args, kwargs))
        return "prefill" if cached == 0 else "decode"

    def padding(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """([B * length] bool, True for padding, or None; whether there was a mask that could not be read).

        A 2-D mask covers the cached tokens and the input. One of another length, or of another form, does
        not tell which of its columns are the input's.
        """
        mask, length = self._given(args, kwargs, "attention_mask"), self.length(args, kwargs)
        if mask is None:
            return None, False
        if self._encoder_decoder or length is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None, True
        cached = _cached_tokens(self._cache(args, kwargs))
        if mask.shape[1] != length and mask.shape[1] != length + (cached or 0):
            return None, True
        return (mask[:, -length:] == 0).flatten(), False

    def _cache(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The keys and values of earlier tokens; models keep the old name until transformers 5.40."""
        for name in _CACHE_NAMES:
            cache = self._given(args, kwargs, name)
            if cache is not None:
                return cache
        return None

    def _given(self, args: Any, kwargs: dict[str, Any], name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name)
        return args[position] if position is not None and position < len(args) else None


def _cached_tokens(cache: Any) -> int | None:
    """Tokens that a cache holds: 0 without one, None where only the device knows."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, TypeError, IndexError, ValueError):
        return None
    return length if isinstance(length, int) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, torch.compile and their like."""
    for name in ("_orig_mod", "module", "_fsdp_wrapped_module"):
        inner = model._modules.get(name)
        if inner is not None:
            return unwrapped(inner)
    return model


def _parameter_names(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(unwrapped(model).forward).parameters)
    except (TypeError, ValueError):
        return []
