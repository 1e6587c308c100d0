"""What the arguments of a model's forward tell: its stage, and which of its tokens are padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.data.schema import Stage
from moe_trace.find.contracts.modules import unwrapped

_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
_CACHES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


class ModelInputs:
    """Reads stage and padding from the arguments of one module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        inner = unwrapped(module)
        self._positions = {name: i for i, name in enumerate(_parameter_names(inner))}
        self._encoder_decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        self._tokens = _DECODER_TOKENS if self._encoder_decoder else _TOKENS

    @property
    def names_tokens(self) -> bool:
        """Whether the module's forward is one of a language model: it is given tokens by name."""
        return any(name in self._positions for name in (*_TOKENS, *_DECODER_TOKENS))

    def length(self, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Tokens per row of the model's input; of the decoder's, where there is one."""
        tokens = self._tensor(args, kwargs)
        return None if tokens is None else int(tokens.shape[1])

    def tokens(self, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Tokens of all rows together, as far as the first tensor tells: to know how large a forward is."""
        tokens = self._tensor(args, kwargs)
        if tokens is None:
            tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tokens is None:
            return None
        return int(tokens.shape[:-1].numel() if tokens.is_floating_point() else tokens.numel())

    def stage(self, args: Any, kwargs: dict[str, Any]) -> Stage:
        """`decode` for one token a row that follows what a cache holds."""
        if torch.is_grad_enabled() and self._module.training:
            return "train"
        if self.length(args, kwargs) != 1:
            return "prefill"
        cached = _cached_tokens(self._given(args, kwargs, _CACHES))
        return "prefill" if cached == 0 else "decode"

    def padding(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """([B * length] bool, True for padding, or None; whether there was a mask that could not be read).

        A 2-D mask covers the cached tokens and the input. One of another length, or of another form, does
        not tell which of its columns are the input's.
        """
        mask, length = self._given(args, kwargs, ("attention_mask",)), self.length(args, kwargs)
        if mask is None:
            return None, False
        if self._encoder_decoder or length is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None, True
        cached = _cached_tokens(self._given(args, kwargs, _CACHES))
        if mask.shape[1] != length and mask.shape[1] != length + (cached or 0):
            return None, True
        return (mask[:, -length:] == 0).flatten(), False

    def _tensor(self, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        for name in self._tokens:
            tokens = self._given(args, kwargs, (name,))
            if isinstance(tokens, Tensor) and tokens.dim() >= 2:
                return tokens
        return None

    def _given(self, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> Any:
        for name in names:
            position = self._positions.get(name)
            given = args[position] if position is not None and position < len(args) else kwargs.get(name)
            if given is not None:
                return given
        return None


def _cached_tokens(cache: Any) -> int | None:
    """Tokens that a cache holds: 0 without one, None where only the device knows."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, TypeError, IndexError, ValueError):
        return None
    return length if isinstance(length, int) else None


def _parameter_names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []
