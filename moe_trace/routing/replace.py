"""`replace_router`: apply a rule after the model's own router to decide what its experts receive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moe_trace.data.errors import MoETraceError, UsageError
from moe_trace.find.routers import LayerSelector, RouterSite, find_routers

RoutingRule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`rule(router_logits [T, E], weights [T, K], indices [T, K], hidden_states [T, D])
-> (weights [T, K'], indices [T, K'])`; an index outside [0, E), such as -1, skips the slot.
"""

Renormalise = Literal["none", "original", "one"]

SKIP = -1
_CONTRACT = "topk-experts"


class RoutingRuleError(MoETraceError):
    """A routing rule returned something that no experts module accepts."""


def replace_router(
    model: nn.Module, fn: RoutingRule, layers: LayerSelector = None, *, renormalise: Renormalise = "none"
) -> RouterReplacement:
    """Let `fn` decide, after each real router, which experts run and with which weights.

    Returns a context manager; leaving it restores the model's own routing. The rules of several open contexts
    run in the order in which they were entered. A skipped slot reaches the experts as index 0 with weight 0,
    because their kernels do not accept negative indices: it costs the same to compute, adds nothing to the
    output, and is recorded as skipped. A rule that returns fewer slots saves the work.

    Args:
        model: the model that contains the routers.
        fn: a `RoutingRule` of plain tensor operations that do not synchronize with the device. Gradients flow
            through the weights that it returns. On gemma4 the "logits" are probabilities, as its router
            returns.
        layers: routers to replace: layer indices, labels, module paths, or a predicate; None selects all.
        renormalise: how the weights that are not skipped are scaled. "none": not at all; "original": to the
            sum of the real router's weights for the token; "one": to 1. In each case, a token without any
            slot gets nothing from its experts.

    Raises:
        NoRoutersFound: the model contains no router that a known contract can read.
        UsageError: a router does not pass (weights, indices) to its experts, or an argument is invalid.
        RoutingRuleError: during a forward, when `fn` returns tensors of another form.
    """
    if renormalise not in get_args(Renormalise):
        raise UsageError(f"expected renormalise to be one of {get_args(Renormalise)}, found {renormalise!r}")
    sites = find_routers(model, layers=layers)
    for site in sites:
        if site.contract.name != _CONTRACT or site.experts is None:
            raise UsageError(
                f"{site.name} ({site.info.router_class}) is read as '{site.contract.name}': it hands no "
                "(weights, indices) to its experts, so no rule can replace them; leave it out with layers="
            )
    return RouterReplacement(sites, fn, renormalise)


class RouterReplacement:
    """Context manager returned by `replace_router`. It can be entered again after it was left."""

    def __init__(self, sites: list[RouterSite], fn: RoutingRule, renormalise: Renormalise) -> None:
        self.sites = [*{site.router: site for site in reversed(sites)}.values()][::-1]  # one per router
        self._applied = [_AppliedRule(site.name, fn, renormalise) for site in self.sites]
        self._active = False

    def __enter__(self) -> RouterReplacement:
        if self._active:
            raise UsageError("this replacement is already active; leave it before entering it again")
        for site, applied in zip(self.sites, self._applied, strict=True):
            _hooks_of(site).add(applied)
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model's own routing. Does nothing if no rule is active."""
        if not self._active:
            return
        for site, applied in zip(self.sites, self._applied, strict=True):
            _hooks_of(site).discard(applied)
        self._active = False


@dataclass(eq=False)
class _AppliedRule:
    name: str
    fn: RoutingRule
    renormalise: Renormalise

    def __call__(
        self, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, hidden_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = self.fn(logits_TE, weights_TK, index_TK, hidden_TD)
        weights, index = self._checked(result, index_TK.shape[0])
        skipped = is_skipped(index, logits_TE)
        weights = weights.masked_fill(skipped, 0.0)
        if self.renormalise != "none":
            target_T1 = weights_TK.sum(-1, keepdim=True) if self.renormalise == "original" else 1.0
            sum_T1 = weights.sum(-1, keepdim=True)
            # The weights of a token without slots sum to 0; dividing by 1 keeps them, and the gradient, at 0.
            weights = weights * (target_T1 / sum_T1.masked_fill(sum_T1 == 0, 1.0))
        return weights.to(weights_TK.dtype), index.masked_fill(skipped, SKIP).to(index_TK.dtype)

    def _checked(self, result: Any, tokens: int) -> tuple[Tensor, Tensor]:
        if isinstance(result, tuple | list) and len(result) == 2:
            weights, index = result
            if (
                isinstance(weights, Tensor)
                and isinstance(index, Tensor)
                and weights.is_floating_point()
                and not index.is_floating_point()
                and weights.shape == index.shape
                and weights.dim() == 2
                and weights.shape[0] == tokens
                and weights.shape[1] > 0
            ):
                return weights, index
        raise RoutingRuleError(
            f"{self.name}: expected the routing rule to return (weights, indices), floats and integers of "
            f"one shape [{tokens}, K], found {_form(result)}"
        )


class _RouterHooks:
    """Forward hooks on one router and its experts while any rule is active on it."""

    def __init__(self, site: RouterSite) -> None:
        self._site = site
        self._rules: list[_AppliedRule] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._logits: dict[int, Tensor] = {}  # by thread, kept between the router and its experts

    def add(self, rule: _AppliedRule) -> None:
        """Run the rule after those that are already active."""
        self._rules = [*self._rules, rule]
        if self._handles or self._site.experts is None:
            return
        # Run before the hooks of any tracer, so that the time of a rule counts as router time.
        self._handles = [
            self._site.router.register_forward_hook(self._after_router, prepend=True),
            self._site.experts.register_forward_pre_hook(
                self._before_experts, prepend=True, with_kwargs=True
            ),
        ]

    def discard(self, rule: _AppliedRule) -> None:
        """Remove the rule, and with the last rule the hooks."""
        self._rules = [active for active in self._rules if active is not rule]
        if not self._rules:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            _hooks.pop(self._site.router, None)

    def _apply(self, logits: Tensor, weights: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        for rule in self._rules:
            weights, index = rule(logits, weights, index, hidden_TD)
        return weights, index.masked_fill(is_skipped(index, logits), 0)

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):  # the router returns only logits and its block selects (DBRX)
            self._logits[threading.get_ident()] = output
            return None
        if not isinstance(output, tuple) or len(output) < 3:
            raise RoutingRuleError(
                f"{self._site.name}: expected the router to return (logits, weights, indices), "
                f"found {_form(output)}; leave it out with layers="
            )
        logits, weights, index, *rest = output
        return (logits, *self._apply(logits, weights, index, args[0]), *rest)

    def _before_experts(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        logits = self._logits.pop(threading.get_ident(), None)
        if logits is None:
            return None
        hidden, index, weights, *rest = args
        weights, index = self._apply(logits.reshape(-1, logits.shape[-1]), weights, index, hidden)
        return (hidden, index, weights, *rest), kwargs


_hooks: dict[nn.Module, _RouterHooks] = {}  # routers with an active rule


def _hooks_of(site: RouterSite) -> _RouterHooks:
    if site.router not in _hooks:
        _hooks[site.router] = _RouterHooks(site)
    return _hooks[site.router]


def is_skipped(index: Tensor, logits: Tensor) -> Tensor:
    """Return which slots have an index outside [0, E)."""
    return (index < 0) | (index >= logits.shape[-1])


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(_form, value))})"
    return type(value).__name__
