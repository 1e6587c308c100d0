"""How one call is read: index and weights as the experts received them, logits from the router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, RouterOutput
from moe_trace.find.contracts.modules import described, require_2d, unwrapped
from moe_trace.find.contracts.overhead_range import overhead_range
from moe_trace.find.contracts.tiled_experts import combined_choice, with_skipped

# The name of the second argument of an experts module's forward, in every family of transformers 5 whose
# index is [T, K]. (`router_mask`, NLLB's, is a mask over all experts.)
INDEX_ARGUMENTS = frozenset({"top_k_index", "router_indices", "selected_experts"})
HIDDEN_ARGUMENT = "hidden_states"


def read_topk_experts(call: Call) -> RouterOutput:
    """Index and weights as the experts received them: the true assignments. Logits from the router."""
    given, logits = call.experts_args, _logits(call)
    if given is not None and len(given) == 3:
        # The usual form, checked in the fewest steps: this runs in every call of every router.
        index, weights = given[1], given[2]
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
            pass  # not tensors: said below
    return _explain_or_read(call, logits)


def _logits(call: Call) -> Any:
    output = call.router_output
    return output[0] if isinstance(output, tuple) and output else output


def _explain_or_read(call: Call, logits: Any) -> RouterOutput:
    """The same step by step, so that what does not fit can be named."""
    index, weights = _choice(call)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] < index.shape[0]:
        raise AdapterMismatch(
            f"expected logits [T, E] beside an index [T, K], found {described(logits)} and {described(index)}"
        )
    if not logits.is_floating_point():
        raise AdapterMismatch(f"expected logits to be floating-point numbers, found {described(logits)}")
    return _of_all_tokens(index, weights, logits)


def _of_all_tokens(index: Tensor, weights: Tensor, logits: Tensor) -> RouterOutput:
    """Where the experts were given fewer tokens than the router, nothing tells which logits are theirs."""
    if logits.shape[0] <= index.shape[0]:
        return RouterOutput(index, weights, logits)
    return RouterOutput(*with_skipped(index, weights, logits.shape[0]), None)


def read_without_logits(call: Call) -> RouterOutput:
    """The decision alone, where logits play no part in it."""
    return RouterOutput(*_choice(call), None)


def read_watched_logits(call: Call) -> RouterOutput:
    """Logits from a module inside the router; None where that was not called as a module."""
    logits = call.watched_output
    index, weights = _choice(call)
    if not isinstance(logits, Tensor):
        return RouterOutput(index, weights, None)
    return _of_all_tokens(index, weights, logits.reshape(-1, logits.shape[-1]))


def choice_inside_reader(experts: nn.Module) -> Callable[[Call], RouterOutput]:
    """The choice of experts that are handed logits, by their own method: a function of the logits alone."""
    choose: Any = unwrapped(experts).route_tokens_to_experts

    def read(call: Call) -> RouterOutput:
        given = (*(call.experts_args or ()), *call.experts_kwargs.values())
        if len(given) != 2 or not isinstance(given[1], Tensor) or given[1].dim() != 2:
            raise AdapterMismatch(f"expected experts(hidden_states, logits [T, E]), found {described(given)}")
        with overhead_range():
            index, weights = choose(given[1])
        return RouterOutput(index, weights, given[1])

    return read


def _choice(call: Call) -> tuple[Tensor, Tensor]:
    """(index [T, K], weights [T, K]) of the call."""
    if call.experts_args is None:  # a fused block did not call the experts module: the router's own word
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
    """[T, K] of what has several dimensions for the tokens: [batch, sequence, K], as AFMoE's had at first."""
    return value.flatten(0, -2) if isinstance(value, Tensor) and value.dim() > 2 else value


def _weights_of_chosen(dense_TE: Tensor, index_TK: Tensor) -> Tensor:
    """[T, K] of weights for all experts, which HunYuan's and Phimoe's first routers return."""
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
    if index_name is not None:  # in whatever order they were named
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


def combine_experts_calls(call: Call, experts_calls: Sequence[Call], top_k: int) -> Call:
    """One decision whose experts were called several times; see `Contract.combine`."""
    logits = _logits(call)
    shape = None
    if isinstance(logits, Tensor) and logits.dim() == 2:
        shape = (logits.shape[0], logits.shape[1])
    index, weights = combined_choice([_choice(one) for one in experts_calls], shape, top_k)
    return Call(call.router_args, call.router_output, (None, index, weights), {}, call.watched_output)


def choice_columns(outputs: Sequence[Any], experts_args: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """What `read_without_logits` reads, of many calls."""
    return [index for _, index, _ in experts_args], [weights for _, _, weights in experts_args]


def topk_columns(outputs: Sequence[Any], experts_args: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """What `read_topk_experts` reads, of many calls."""
    logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return *choice_columns(outputs, experts_args), logits
