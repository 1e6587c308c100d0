"""Readers of contract `topk-experts`: index and weights as the experts received them, the router's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_trace.find.contracts.contract import AdapterMismatch, Call, RouterOutput
from moe_trace.find.contracts.modules import described, int_attribute, require_2d, unwrapped
from moe_trace.find.contracts.overhead_range import overhead_range

# Names of the second argument of an experts module's forward, in every family of transformers 5 whose index
# is [T, K]. (NLLB's `router_mask` is a mask over all experts.)
INDEX_ARGUMENTS = frozenset({"top_k_index", "router_indices", "selected_experts"})
HIDDEN_ARGUMENT = "hidden_states"


def read_topk_experts(call: Call) -> RouterOutput:
    """Read the actual assignments, as the experts received them, and the router's logits."""
    arguments, logits = call.experts_args, _logits(call)
    if arguments is not None and len(arguments) == 3:
        # This fast path checks the usual form, since it runs for every call of every router.
        index, weights = arguments[1], arguments[2]
        try:
            shape, logits_shape = index.shape, logits.shape
            if (
                shape == weights.shape
                and len(shape) == len(logits_shape) == 2
                and shape[0] == logits_shape[0]
                and logits.is_floating_point()
                and not index.is_floating_point()
            ):
                return RouterOutput(index, weights, logits)
        except AttributeError:
            pass  # not tensors, which is reported below
    return _read_checked(call, logits)


def _logits(call: Call) -> Any:
    output = call.router_output
    return output[0] if isinstance(output, tuple) and output else output


def _read_checked(call: Call, logits: Any) -> RouterOutput:
    """Read a call step by step, with an error that names what does not match."""
    index, weights = _choice(call)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] < index.shape[0]:
        raise AdapterMismatch(
            f"expected logits [T, E] beside an index [T, K], found {described(logits)} and {described(index)}"
        )
    if not logits.is_floating_point():
        raise AdapterMismatch(f"expected logits to be floating-point numbers, found {described(logits)}")
    return _pad_to_all_tokens(index, weights, logits)


def _pad_to_all_tokens(index: Tensor, weights: Tensor, logits: Tensor) -> RouterOutput:
    """Pad to all tokens if the experts received fewer, without logits: it is unknown which are theirs."""
    if logits.shape[0] <= index.shape[0]:
        return RouterOutput(index, weights, logits)
    dropped = (0, 0, 0, logits.shape[0] - index.shape[0])
    with overhead_range():  # the slots of dropped tokens are skipped
        return RouterOutput(functional.pad(index, dropped, value=-1), functional.pad(weights, dropped), None)


def read_without_logits(call: Call) -> RouterOutput:
    """Read index and weights only, for routers without usable logits."""
    return RouterOutput(*_choice(call), None)


def read_watched_logits(call: Call) -> RouterOutput:
    """Read logits from a module inside the router; they are None if it was not called as a module."""
    logits = call.watched_output
    index, weights = _choice(call)
    if not isinstance(logits, Tensor):
        return RouterOutput(index, weights, None)
    return _pad_to_all_tokens(index, weights, logits.reshape(-1, logits.shape[-1]))


def choice_inside_reader(experts: nn.Module) -> Callable[[Call], RouterOutput]:
    """Return a reader for experts that receive logits, which repeats their choice by their own method."""
    choose: Any = unwrapped(experts).route_tokens_to_experts

    def read(call: Call) -> RouterOutput:
        arguments = (*(call.experts_args or ()), *call.experts_kwargs.values())
        if len(arguments) != 2 or not isinstance(arguments[1], Tensor) or arguments[1].dim() != 2:
            raise AdapterMismatch(
                f"expected experts(hidden_states, logits [T, E]), found {described(arguments)}"
            )
        with overhead_range():
            index, weights = choose(arguments[1])
        return RouterOutput(index, weights, arguments[1])

    return read


def _choice(call: Call) -> tuple[Tensor, Tensor]:
    """Return (index [T, K], weights [T, K]) of the call."""
    if call.experts_args is None:  # a fused block did not call the experts module: use the router's output
        index, weights = _router_choice(call.router_output)
    else:
        index, weights = _experts_choice(call)
    index, weights = _by_slot(index), _by_slot(weights)
    require_2d("index", index, integer=True)
    require_2d("weights", weights)
    if weights.shape[0] == index.shape[0] and weights.shape[1] > index.shape[1]:
        weights = _weights_of_chosen(weights, index)
    if index.shape != weights.shape:
        raise AdapterMismatch(
            f"expected index and weights of one shape [T, K], found {described(index)}, {described(weights)}"
        )
    return index, weights


def _by_slot(value: Any) -> Any:
    """Flatten token dimensions to [T, K], such as [batch, sequence, K] of older versions of AFMoE."""
    return value.flatten(0, -2) if isinstance(value, Tensor) and value.dim() > 2 else value


def _weights_of_chosen(dense_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Select weights [T, K] from those of all experts, as returned by older routers of HunYuan and Phimoe."""
    with overhead_range():
        return dense_TE.gather(1, index_TK.long().clamp(0, dense_TE.shape[1] - 1))


def _router_choice(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) < 3:
        raise AdapterMismatch(
            f"expected the router to return (logits, weights, index), found {described(output)}"
        )
    return output[2], output[1]


def _experts_choice(call: Call) -> tuple[Any, Any]:
    arguments: tuple[Any, ...] = call.experts_args or ()
    named = dict(call.experts_kwargs)
    index_name = next((name for name in named if name in INDEX_ARGUMENTS), None)
    if index_name is not None:  # keyword arguments may have any order
        index = named.pop(index_name)
        rest = [value for name, value in named.items() if name != HIDDEN_ARGUMENT]
        arguments = (None, index, *rest)
    else:
        arguments = (*arguments, *named.values())
    if len(arguments) < 3:
        raise AdapterMismatch(
            f"expected experts(hidden_states, index, weights), found {len(arguments)} arguments"
        )
    return arguments[1], arguments[2]


def choice_columns(outputs: Sequence[Any], experts_args: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Read many calls like `read_without_logits`."""
    return [index for _, index, _ in experts_args], [weights for _, _, weights in experts_args]


def topk_columns(outputs: Sequence[Any], experts_args: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Read many calls like `read_topk_experts`."""
    logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return *choice_columns(outputs, experts_args), logits


# -- router calls whose experts are called several times: by tile, by slot, or hot and cold ones separately --


def combine_experts_calls(call: Call, experts_calls: Sequence[Call], top_k: int) -> Call:
    """Merge several calls of the experts for one router call; see `Contract.combine`."""
    logits = _logits(call)
    shape = None
    if isinstance(logits, Tensor) and logits.dim() == 2:
        shape = (logits.shape[0], logits.shape[1])
    index, weights = _combined_choice([_choice(experts_call) for experts_call in experts_calls], shape, top_k)
    return Call(call.router_args, call.router_output, (None, index, weights), {}, call.watched_output)


def _combined_choice(
    choices: Sequence[tuple[Tensor, Tensor]], logits_shape: tuple[int, int] | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Merge the (index [T, K], weights [T, K]) of several calls.

    Args:
        choices: (index, weights) of each call, in order.
        logits_shape: (T, E) of the router's logits, or None if it has none.
        top_k: K, or 0 if unknown.

    Raises:
        AdapterMismatch: the calls do not make up the router's tokens.
    """
    tokens, experts = logits_shape or (choices[0][0].shape[0], 2**31)
    rows, slots = [i.shape[0] for i, _ in choices], [i.shape[1] for i, _ in choices]
    with overhead_range():
        if len(set(slots)) == 1 and sum(rows) == tokens:
            return _concatenate(choices, dim=0)
        if set(rows) != {tokens}:
            raise AdapterMismatch(
                f"expected the {len(choices)} calls of the experts to make up {tokens} tokens, found {rows}"
            )
        if sum(slots) == top_k or len(set(slots)) > 1:
            return _concatenate(choices, dim=1)
        return _merge_slots(choices, experts)


def _concatenate(choices: Sequence[tuple[Tensor, Tensor]], *, dim: int) -> tuple[Tensor, Tensor]:
    return torch.cat([i for i, _ in choices], dim), torch.cat([w for _, w in choices], dim)


def _merge_slots(choices: Sequence[tuple[Tensor, Tensor]], experts: int) -> tuple[Tensor, Tensor]:
    """Take each slot from the first call in which it was not masked out."""
    index, weights = choices[0]
    for other_index, other_weights in choices[1:]:
        unused = (weights == 0) | (index < 0) | (index >= experts)
        index = torch.where(unused, other_index, index)
        weights = torch.where(unused, other_weights, weights)
    return index, weights


# -- fused blocks, which call neither their router nor their experts -----------------------------------------

# Routers that consist of a top-k of `linear(x, weight, bias)` and a softmax over the k: only for these are
# the assignments of a fused kernel known without inspecting it.
_RECOMPUTABLE_ROUTERS = frozenset({"GptOssTopKRouter"})


def fused_block_reader(router: nn.Module) -> Callable[[tuple[Any, ...], Any], RouterOutput] | None:
    """Return `read(arguments, output)` for calls of the block, or None if assignments cannot be recomputed.

    With MXFP4 or MegaBlocks kernels, GPT-OSS computes the logits from `router.weight` inside the block and
    passes them to a kernel. They are recomputed from the block's input, by the same formula as in the
    router's own forward. Other fused blocks are reported as never called.
    """
    if type(router).__name__ not in _RECOMPUTABLE_ROUTERS:
        return None
    top_k = int_attribute(router, "top_k")

    def read(arguments: tuple[Any, ...], output: Any) -> RouterOutput:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise AdapterMismatch(f"expected the fused block to be given a tensor, found {described(hidden)}")
        with overhead_range():
            flat_TH = hidden.reshape(-1, hidden.shape[-1])
            weight, bias = router.get_parameter("weight"), router.get_parameter("bias")
            logits_TE = torch.nn.functional.linear(flat_TH, weight, bias)
            top_TK, index_TK = logits_TE.topk(top_k, dim=-1)
            return RouterOutput(index_TK, top_TK.softmax(-1), logits_TE)

    return read
