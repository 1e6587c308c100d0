"""Tests of random sequences of uses: unchanged results of the model, true records, and all calls counted."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe_trace
from models import tiny_olmoe, token_batch

EXPERTS, LAYERS = 8, 2
Act = Callable[["User"], Any]


class Stop(Exception):
    """The user's own."""


class User:
    """A model, and what somebody does to it. `results` is what must not depend on a tracer."""

    def __init__(self) -> None:
        self.model: Any = tiny_olmoe(layers=LAYERS)
        self.results: list[Any] = []
        self.handles: list[Any] = []
        self.batches = 0
        self.tracer: Any = None

    @property
    def blocks(self) -> list[Any]:
        return [layer.mlp for layer in self.model.model.layers]

    def batch(self) -> dict[str, torch.Tensor]:
        self.batches += 1
        return token_batch(2, 3, seed=self.batches)

    def forward(self, model: Any = None) -> torch.Tensor:
        out = (model or self.model)(**self.batch(), use_cache=False)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state  # type: ignore[no-any-return]

    def with_blocks(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        for block in self.blocks:
            block.forward = types.MethodType(
                lambda self, hidden: forward(self, hidden.flatten(0, 1)).view_as(hidden), block
            )

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for block in self.blocks:
            for module in (block, block.gate, block.experts):
                module.__dict__.pop("forward", None)


ACTS: list[Act] = []


def act(function: Act) -> Act:
    ACTS.append(function)
    return function


# -- forwards ----------------------------------------------------------------------------------------------


@act
def infers(user: User) -> Any:
    with torch.no_grad():
        return [user.forward() for _ in range(3)]


@act
def infers_without_versions(user: User) -> Any:
    with torch.inference_mode():
        return user.forward().clone()


@act
def enters_further_inside(user: User) -> Any:
    with torch.no_grad():
        return user.forward(user.model.model)


@act
def calls_a_block(user: User) -> Any:
    with torch.no_grad():
        return user.blocks[1](torch.ones(1, 3, user.model.config.hidden_size))


@act
def calls_a_gate(user: User) -> Any:
    with torch.no_grad():
        return user.blocks[0].gate(torch.ones(3, user.model.config.hidden_size))[0]


def on_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What each returns on a thread of its own, or the kind of error that it ends with."""
    out: dict[int, Any] = {}

    def go(number: int) -> None:
        try:
            out[number] = functions[number]()
        except BaseException as error:
            out[number] = type(error).__name__

    threads = [threading.Thread(target=go, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [out[number] for number in range(len(functions))]


@act
def generates_on_a_thread(user: User) -> Any:
    ids = user.batch()["input_ids"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    return on_threads(lambda: user.model.generate(ids, **options))


@act
def calls_it_on_two_threads(user: User) -> Any:
    batches = [user.batch(), user.batch()]

    def forward(number: int) -> Any:
        with torch.no_grad():
            return user.model(**batches[number], use_cache=False).logits

    return on_threads(lambda: forward(0), lambda: forward(1))


@act
def dies_on_a_thread(user: User) -> Any:
    """`sys.exit` on a thread ends that thread alone, and no hook is told."""

    def leave(*_: Any) -> None:
        raise SystemExit

    handle = user.blocks[0].experts.register_forward_pre_hook(leave)
    try:
        return on_threads(user.forward)
    finally:
        handle.remove()


@act
def works_on_no_tokens(user: User) -> Any:
    with torch.no_grad():
        return user.blocks[0](torch.zeros(1, 0, user.model.config.hidden_size))


@act
def changes_the_dtype(user: User) -> Any:
    user.model.to(torch.bfloat16)
    try:
        with torch.no_grad():
            return user.forward()
    finally:
        user.model.to(torch.float32)


@act
def asks_for_what_is_recorded(user: User) -> None:
    if user.tracer is not None:
        user.tracer.samples()


def _behind(steered: bool) -> Act:
    def leaves_experts_behind(user: User) -> Any:
        """They run on a thread when the forward is over, or while the next one is under way."""
        user.leave()
        with torch.no_grad():
            user.forward()  # until experts were called, a block without such a call can only be a fused one
        pool, waiting = ThreadPoolExecutor(1), []
        go = threading.Event()

        def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
            _, weights, index = self.gate(tokens)
            if steered:
                index, weights = (index + 1) % EXPERTS, weights.clone()

            def late() -> None:
                go.wait(10)
                with torch.no_grad():
                    self.experts(tokens, index, weights)

            waiting.append(pool.submit(late))
            return tokens

        user.with_blocks(block)
        with torch.no_grad():
            out = [user.forward()]
            go.set()
            out.append(user.forward())
        for one in waiting:
            one.result()
        pool.shutdown()
        user.leave()
        return out

    leaves_experts_behind.__name__ += "_steered" * steered
    return leaves_experts_behind


ACTS += [_behind(False), _behind(True)]


def trains(user: User) -> Any:
    user.model.train()
    loss = user.forward().float().pow(2).mean()
    loss.backward()
    sums = [p.grad.double().sum() for p in user.model.parameters() if p.grad is not None]
    user.model.zero_grad()
    user.model.eval()
    return [loss.detach(), *sums]


ACTS.append(trains)


@act
def trains_checkpointed(user: User) -> Any:
    user.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        return trains(user)
    finally:
        user.model.gradient_checkpointing_disable()


@act
def trains_reentrant(user: User) -> Any:
    user.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    try:
        return trains(user)
    finally:
        user.model.gradient_checkpointing_disable()


@act
def trains_with_a_policy(user: User) -> Any:
    """The number of operators that it was asked about is a result: nothing of ours may be among them."""
    asked = [0]

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked[0] += 1
        saved = operator is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in user.blocks:
        inner = block.forward
        block.forward = functools.partial(checkpoint, inner, use_reentrant=False, context_fn=contexts)
    try:
        return [*trains(user), asked[0]]
    finally:
        for block in user.blocks:
            del block.forward


@act
def trains_with_offloaded_activations(user: User) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return trains(user)


@act
def trains_under_autocast(user: User) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return trains(user)


@act
def calls_it_as_a_function(user: User) -> Any:
    parameters = {name: p.detach() * 1.01 for name, p in user.model.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(user.model, parameters, (), {**user.batch(), "use_cache": False})
    return out.logits


@act
def copies_and_pickles(user: User) -> Any:
    others = copy.deepcopy(user.model), pickle.loads(pickle.dumps(user.model))
    before = user.batches
    with torch.no_grad(), elsewhere():
        out = [user.forward(other) for other in others]
    user.batches = before
    return out


# -- changes that stay until the user takes them back ------------------------------------------------


@act
def steers_the_experts(user: User) -> None:
    def hook(module: nn.Module, args: Any) -> Any:
        return args[0], (args[1] + 1) % EXPERTS, args[2]

    user.handles += [block.experts.register_forward_pre_hook(hook) for block in user.blocks]


@act
def steers_by_keyword(user: User) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        weights = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
        return args[:1], {"top_k_index": (index + 2) % EXPERTS, "top_k_weights": weights}

    experts = user.blocks[0].experts
    user.handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))


@act
def steers_a_router(user: User) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0], output[1], output[2].flip(0)

    user.handles.append(user.blocks[1].gate.register_forward_hook(hook, always_call=True))


@act
def writes_into_the_choice(user: User) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output[2].add_(3).remainder_(EXPERTS)

    user.handles.append(user.blocks[0].gate.register_forward_hook(hook))


@act
def writes_over_the_choice(user: User) -> Any:
    """When the experts are done with it, behind all hooks."""
    hook = user.blocks[0].experts.register_forward_hook(lambda m, args, out: (args[1].zero_(), None)[1])
    with torch.no_grad():
        logits = [user.forward() for _ in range(3)]
    hook.remove()
    return logits


@act
def tiles_a_block_by_itself(user: User) -> Any:
    for block in user.blocks:
        block.forward = lambda hidden, block=block: (
            torch.cat([block(row.contiguous()) for row in hidden.split(1, dim=1)], dim=1)
            if hidden.shape[1] > 1
            else type(block).forward(block, hidden)
        )
    with torch.no_grad():
        logits = [user.forward() for _ in range(2)]
    for block in user.blocks:
        del block.forward
    return logits


@act
def settles(user: User) -> Any:
    """So many forwards that routers are known, and have the plainest hooks."""
    with torch.no_grad():
        return [user.forward() for _ in range(7)]


@act
def calls_gates_twice(user: User) -> None:
    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        self.gate(tokens * 2)
        return self.experts(tokens, index, weights)  # type: ignore[no-any-return]

    user.with_blocks(block)


@act
def runs_experts_on_a_thread(user: User) -> None:
    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        grad = torch.is_grad_enabled()

        def go() -> Any:
            with torch.set_grad_enabled(grad):
                return self.experts(tokens, index, weights)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(go).result()  # type: ignore[no-any-return]

    user.with_blocks(block)


@act
def fuses_the_block(user: User) -> None:
    """Its experts are not called as a module."""

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights)  # type: ignore[no-any-return]

    user.with_blocks(block)


@act
def reuses_buffers(user: User) -> None:
    for block in user.blocks:
        inner, kept = block.gate.forward, {}

        def forward(tokens: Any, inner: Any = inner, kept: dict[Any, Any] = kept) -> Any:
            logits, weights, index = inner(tokens)
            buffer = kept.setdefault(index.shape, torch.empty_like(index))
            return logits, weights, buffer.copy_(index)

        block.gate.forward = forward


@act
def looks_inside(user: User) -> None:
    """A verifier: a hook of a layer runs the model, inside a forward of it."""
    inside = [False]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not inside[0] and torch._C._current_graph_task_id() == -1:
            inside[0] = True
            try:
                with torch.no_grad():
                    user.model(**token_batch(1, 2, seed=0), use_cache=False)
            finally:
                inside[0] = False

    user.handles.append(user.model.model.layers[0].register_forward_hook(hook))


def _raises(where: str, when: str, error: type[BaseException]) -> Act:
    def raises(user: User) -> Any:
        block = user.blocks[1]
        target = {
            "gate": block.gate,
            "experts": block.experts,
            "block": block,
            "attention": user.model.model.layers[1].self_attn,
        }[where]

        def hook(*_: Any) -> None:
            raise error("the user's")

        put = target.register_forward_pre_hook if when == "before" else target.register_forward_hook
        handle = put(hook)
        try:
            with torch.no_grad(), suppress(error):
                user.forward()
                return "not raised"
        finally:
            handle.remove()
        return "raised"

    raises.__name__ = f"{error.__name__}_{when}_{where}"
    return raises


ACTS += [
    _raises(where, when, error)
    for where in ("gate", "experts", "block", "attention")
    for when in ("before", "after")
    for error in (Stop, KeyboardInterrupt, GeneratorExit)
]


@act
def leaves(user: User) -> None:
    user.leave()


# -- what must hold -----------------------------------------------------------------------------------------


class Truth(threading.local):
    quiet = False


TRUTH = Truth()


@contextmanager
def elsewhere() -> Iterator[None]:
    """What runs inside is another model's."""
    TRUTH.quiet = True
    try:
        yield
    finally:
        TRUTH.quiet = False


@contextmanager
def received() -> Iterator[list[tuple[int, list[int]]]]:
    """(id of the experts, tokens of each) of every call outside a backward, beneath all hooks."""
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    calls, inner = [], OlmoeExperts.forward

    @functools.wraps(inner)
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        if not TRUTH.quiet and torch._C._current_graph_task_id() == -1:
            calls.append((id(self), np.bincount(top_k_index.numpy().ravel(), minlength=EXPERTS).tolist()))
        return inner(self, hidden_states, top_k_index, top_k_weights)

    OlmoeExperts.forward = forward  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        OlmoeExperts.forward = inner  # type: ignore[method-assign]


def does(user: User, acts: Sequence[Act]) -> None:
    for one in acts:
        try:
            user.results.append(one(user))
        except Exception as error:  # a mistake of the user's, with a tracer and without
            user.results.append(type(error).__name__)
            user.model.eval()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.timeout(300)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    acts=st.lists(st.sampled_from(ACTS), min_size=2, max_size=7), profiled=st.booleans(), ends=st.booleans()
)
def test_whatever_users_do(acts: list[Act], profiled: bool, ends: bool) -> None:
    acts = [*acts, *([infers] if ends else [])]
    bare, user = User(), User()
    with received():
        does(bare, acts)
    hooks = moe_trace.profile if profiled else moe_trace.MoETracer
    layer_of = {id(block.experts): number for number, block in enumerate(user.blocks)}
    with received() as calls, hooks(user.model) as traced:
        user.tracer = traced.tracer if profiled else traced
        does(user, acts)
    assert same(user.results, bare.results)
    check(user.tracer, [(layer_of[which], counts) for which, counts in calls])
    for a, b in zip(user.model.modules(), bare.model.modules(), strict=True):
        assert len(a._forward_hooks) == len(b._forward_hooks)
        assert len(a._forward_pre_hooks) == len(b._forward_pre_hooks)


def check(tracer: moe_trace.MoETracer, calls: list[tuple[int, list[int]]]) -> None:
    lost = tracer.recording().lost
    assert lost.hook_failure is None
    for number, site in enumerate(tracer.sites):
        samples = [s for s in tracer.samples() if s.name == site.name]
        reasons = lost.calls.get(site.name, {})
        assert lost.calls_seen.get(site.name, 0) == len(samples) + sum(reasons.values())
        recorded = Counter(tuple(s.assignments.tolist()) for s in samples if s.phase == "forward")
        true = Counter(tuple(counts) for layer, counts in calls if layer == number)
        assert not recorded - true, f"{site.name}: {recorded - true} were not received"
        missing = true - recorded
        assert (
            missing.total() <= sum(reasons.values()) + lost.not_reached.get(site.name, 0) + lost.overwritten
        )
