"""Read a forward's stage and padding from the arguments of the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.data.schema import Stage
from moe_trace.find.contracts.modules import unwrapped
from moe_trace.record.forward.isolation import apart

_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
_POSITIONS = ("position_ids", "positions", "input_pos")
_CACHES = ("cache", "past_key_values")  # since transformers 5.24, and before


class ModelInputs:
    """Reader of stage and padding from the arguments of one module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        inner = unwrapped(module)
        self._positions = {name: i for i, name in enumerate(_parameter_names(inner))}
        self._encoder_decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        names = _DECODER_TOKENS if self._encoder_decoder else _TOKENS
        self._tokens = self._places(names)
        self._caches, self._mask = self._places(_CACHES), self._places(("attention_mask",))
        self._own_mask = self._places(("decoder_attention_mask",)) if self._encoder_decoder else self._mask
        self.position_names = ("decoder_position_ids",) if self._encoder_decoder else _POSITIONS
        """Names of the arguments that hold the position of each token."""
        self.names_tokens = any(name in self._positions for name in (*_TOKENS, *_DECODER_TOKENS))
        """Whether the module's forward takes tokens by name, as that of a language model."""
        self.names_mask = "attention_mask" in self._positions
        """Whether a mask may be passed positionally."""

    def length(self, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Return the number of tokens per row of the model's input, or of the decoder's if there is one."""
        tokens = self.tokens(args, kwargs)
        return None if tokens is None else int(tokens.shape[1])

    def look(self, args: Any, kwargs: dict[str, Any]) -> tuple[Stage, int | None, bool]:
        """Return (stage, number of tokens in the named or else first tensor, whether it was named)."""
        named = tokens = self.tokens(args, kwargs) if kwargs or self.names_tokens else None
        if tokens is None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    tokens = value
                    break
        count = None
        if tokens is not None:
            shape = tokens.shape
            count = shape.numel()
            if tokens.is_floating_point() and shape:
                count //= shape[-1] or 1
        if named is None and not (torch.is_grad_enabled() and self._module.training):
            return "prefill", count, False
        return self._stage(named, args, kwargs), count, named is not None

    def stage(self, args: Any, kwargs: dict[str, Any]) -> Stage:
        """Return the stage: `decode` for one token per row that continues a cache."""
        return self._stage(self.tokens(args, kwargs), args, kwargs)

    def _stage(self, tokens: Tensor | None, args: Any, kwargs: dict[str, Any]) -> Stage:
        if torch.is_grad_enabled() and self._module.training:
            return "train"
        if tokens is None or tokens.shape[1] != 1:
            return "prefill"
        cached = _cached_tokens(self._given(args, kwargs, self._caches))
        return "prefill" if cached == 0 else "decode"

    def padding(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """Return ([B * length] bool padding mask or None, whether there was a mask that could not be read).

        A 2-D mask covers the cached tokens and the input. In a mask of another length or form, the columns of
        the input are unknown.
        """
        mask = self._given(args, kwargs, self._mask)
        if mask is None:
            return None, False
        length = self.length(args, kwargs)
        if self._encoder_decoder or length is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None, True
        cached = _cached_tokens(self._given(args, kwargs, self._caches))
        if mask.shape[1] != length and mask.shape[1] != length + (cached or 0):
            return None, True
        try:
            with apart():
                return (mask[:, -length:] == 0).flatten(), False
        except Exception:  # an unexpected kind of mask
            return None, True

    def tokens(self, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """Return ids or embeddings of the model's (or decoder's) input, one row per sequence."""
        for name, position in self._tokens:
            tokens = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() >= 2:
                return tokens
        return None

    def given(self, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> Any:
        """Return the first argument with one of these names that is not None."""
        return self._given(args, kwargs, self._places(names))

    def mask(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the attention mask of the tokens, in any form."""
        return self._given(args, kwargs, self._own_mask)

    def cached(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the number of cached tokens before each row: an int, a tensor, or None if unknown."""
        cache = self._given(args, kwargs, self._caches)
        return 0 if cache is None else _cached(cache)

    def _places(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Return (name, position) of arguments; a missing parameter gets a position that no call reaches."""
        return [(name, self._positions.get(name, sys.maxsize)) for name in names]

    @staticmethod
    def _given(args: Any, kwargs: dict[str, Any], places: Sequence[tuple[str, int]]) -> Any:
        for name, position in places:
            given = args[position] if position < len(args) else kwargs.get(name)
            if given is not None:
                return given
        return None


def _cached_tokens(cache: Any) -> int | None:
    """Return the number of tokens in a cache: 0 without one, None if only the device knows."""
    if cache is None:
        return 0
    length = _cached(cache)
    return length if isinstance(length, int) else None


def _cached(cache: Any) -> Any:
    try:
        return cache.get_seq_length()
    except (AttributeError, TypeError, IndexError, ValueError):
        return None


def _parameter_names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []
