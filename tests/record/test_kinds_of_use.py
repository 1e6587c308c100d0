"""Tests of further uses of a model: recorded as the experts received it, or counted with a reason."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts

EXPERTS = 8

Run = Callable[[], Any]


def forwards(model: nn.Module, count: int = 9) -> None:
    for seed in range(count):
        model(**token_batch(2, 3, seed=seed))


def first_gate(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.gate  # type: ignore[union-attr,return-value]


@contextmanager
def compiled_routers(model: nn.Module, backend: str = "eager") -> Iterator[Run]:
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        layer.mlp.gate.compile(backend=backend)
    yield lambda: forwards(model)
    torch._dynamo.reset()


@contextmanager
def routers_compiled_ahead_of_time(model: nn.Module) -> Iterator[Run]:
    """What AOTAutograd's code hands out was written to once, in every call."""
    with torch.no_grad(), compiled_routers(model, "aot_eager") as run:
        yield run


@contextmanager
def outputs_written_to(model: nn.Module) -> Iterator[Run]:
    """By a hook of the user's, in every call, before the experts receive them."""
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        layer.mlp.gate.register_forward_hook(lambda m, args, out: [tensor.mul_(1) for tensor in out] and None)
    with torch.no_grad():
        yield lambda: forwards(model)


@contextmanager
def another_default_dtype(model: nn.Module) -> Iterator[Run]:
    torch.set_default_dtype(torch.float64)
    try:
        yield lambda: forwards(model)
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def half_precision(model: nn.Module) -> Iterator[Run]:
    model.to(torch.bfloat16)
    yield lambda: forwards(model)


@contextmanager
def later_hooks(model: nn.Module) -> Iterator[Run]:
    """Put on a router while it is traced, they change its output: the experts receive what they return."""

    def run() -> None:
        forwards(model)
        handle = first_gate(model).register_forward_hook(lambda m, a, out: (out[0], out[1], out[2].flip(0)))
        forwards(model)
        handle.remove()
        forwards(model)

    yield run


@contextmanager
def swapped_parameters(model: nn.Module) -> Iterator[Run]:
    """As ZeRO-3 does: a module has its parameters only while it runs."""
    handles = []
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        for module in (layer.mlp.gate, layer.mlp.experts):
            whole = {name: p.data for name, p in module.named_parameters(recurse=False)}

            def gather(m: nn.Module, args: Any, whole: dict[str, Any] = whole) -> None:
                for name, parameter in m.named_parameters(recurse=False):
                    parameter.data = whole[name]

            def free(m: nn.Module, args: Any, output: Any) -> None:
                for parameter in m.parameters(recurse=False):
                    parameter.data = parameter.data.new_empty(0)

            handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(free)]
            free(module, (), None)
    yield lambda: forwards(model)
    for handle in handles:
        handle.remove()


class Int8(nn.Module):
    """As libraries that quantise weights do: int8 and a scale, multiplied out when they are used."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", weight.abs().amax(-1, keepdim=True) / 127)
        self.register_buffer("quantised", (weight / self.scale).round().to(torch.int8))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.quantised * self.scale  # type: ignore[no-any-return,operator]


@contextmanager
def quantised(model: nn.Module) -> Iterator[Run]:
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr,operator]
            parametrize.register_parametrization(
                layer.mlp.gate, "weight", Int8(layer.mlp.gate.weight), unsafe=True
            )
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    yield lambda: forwards(model)


@contextmanager
def sharded(model: nn.Module) -> Iterator[Run]:
    """FSDP 2: parameters are gathered for a module while it runs, and its hooks are put on by name."""
    with one_process() as mesh:
        for layer in model.model.layers:  # type: ignore[union-attr,operator]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield lambda: forwards(model)


@contextmanager
def split_router_weights(model: nn.Module) -> Iterator[Run]:
    with one_process() as mesh:
        for layer in model.model.layers:  # type: ignore[union-attr,operator]
            split_router(layer.mlp.gate, mesh, Shard(0), lambda out: out.full_tensor())
        yield lambda: forwards(model)


@contextmanager
def one_process() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def split_router(gate: nn.Module, mesh: Any, place: Any, handed_out: Callable[[Any], Any]) -> None:
    """Its weight is a DTensor, as with tensor parallelism."""
    gate.weight = nn.Parameter(distribute_tensor(gate.weight.data, mesh, [place]))
    inner = gate.forward

    def forward(hidden: torch.Tensor) -> Any:
        return tuple(map(handed_out, inner(DTensor.from_local(hidden, mesh, [Replicate()]))))

    gate.forward = forward


@contextmanager
def offloaded(model: nn.Module) -> Iterator[Run]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    yield lambda: forwards(model)
    accelerate.hooks.remove_hook_from_submodules(model)


@contextmanager
def streamed(model: nn.Module) -> Iterator[Run]:
    """`generate` on a thread of its own, while this one takes the text."""
    transformers = pytest.importorskip("transformers")

    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids)) + " "

    def run() -> None:
        streamer = transformers.TextIteratorStreamer(Tokenizer(), timeout=60)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "streamer": streamer, "do_sample": False}
        ids = token_batch(1, 4)["input_ids"]
        thread = threading.Thread(target=model.generate, kwargs={"input_ids": ids, **options})
        thread.start()
        assert "".join(streamer)
        thread.join()

    yield run


@contextmanager
def functional(model: nn.Module) -> Iterator[Run]:
    parameters = dict(model.named_parameters())

    def run() -> None:
        for seed in range(9):
            torch.func.functional_call(model, parameters, (), token_batch(2, 3, seed=seed))

    yield run


@contextmanager
def in_inference_mode(model: nn.Module) -> Iterator[Run]:
    def run() -> None:
        forwards(model)
        with torch.inference_mode():
            forwards(model)
        forwards(model)

    yield run


USES = [
    compiled_routers,
    routers_compiled_ahead_of_time,
    outputs_written_to,
    another_default_dtype,
    half_precision,
    later_hooks,
    swapped_parameters,
    quantised,
    sharded,
    split_router_weights,
    offloaded,
    streamed,
    functional,
    in_inference_mode,
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_what_is_recorded_is_what_the_experts_received(use: Any) -> None:
    model = tiny_olmoe(layers=2)
    with use(model) as run, torch.no_grad(), watch_experts(model) as calls:
        with moe_trace.MoETracer(model) as tracer:
            run()
        received = [c.assignments(EXPERTS) for c in calls]
        assert len(received) >= 12
        assert [s.assignments.tolist() for s in tracer.samples()] == received
    lost = tracer.recording().lost
    assert not lost.calls and not lost.not_reached and lost.hook_failure is None


def test_two_tracers_and_a_profile_at_once() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), watch_experts(model) as calls:
        with moe_trace.MoETracer(model) as outer:
            forwards(model)
            with moe_trace.MoETracer(model, every=3) as inner, moe_trace.profile(model) as prof:
                forwards(model)
            forwards(model)
        received = [c.assignments(EXPERTS) for c in calls]
    assert [s.assignments.tolist() for s in outer.samples()] == received
    assert [s.assignments.tolist() for s in prof.tracer.samples()] == received[18:36]
    assert [s.step for s in inner.samples()] == [0, 0, 3, 3, 6, 6]
    third = [received[18 + 2 * forward + layer] for forward in (0, 3, 6) for layer in (0, 1)]
    assert [s.assignments.tolist() for s in inner.samples()] == third


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize("error", [KeyError, StopIteration, AssertionError, RecursionError, Unforeseen])
def test_whatever_a_contract_raises_is_counted(error: type[Exception]) -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        hooks = tracer._hooks.routers[0]
        read, seen = hooks.read, [0]

        def raises_now_and_then(call: Any) -> Any:
            seen[0] += 1
            if seen[0] % 3 == 0:
                raise error("of a kind that nobody thought of")
            return read(call)

        hooks.read = raises_now_and_then
        with pytest.warns(RuntimeWarning, match="of a kind that nobody thought of"):
            forwards(model)
    lost, name = tracer.recording().lost, tracer.sites[0].name
    assert lost.calls == {name: {"unreadable": 3}} and lost.calls_seen[name] == 9
    first = [c.assignments(EXPERTS) for c in calls][0::2]
    kept = [s.assignments.tolist() for s in tracer.samples() if s.name == name]
    assert kept == [one for forward, one in enumerate(first, start=1) if forward % 3]


class Quantised(nn.Module):
    """Stands where the experts were, as libraries that quantise replace modules."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner = experts

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return self.inner(hidden_states, top_k_index, top_k_weights)


def test_experts_replaced_while_traced_are_counted_and_a_new_tracer_records_them() -> None:
    model = tiny_olmoe(layers=2)
    block = model.model.layers[0].mlp
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        forwards(model)
        block.experts = Quantised(copy.deepcopy(block.experts))
        forwards(model)
    lost, name = tracer.recording().lost, tracer.sites[0].name
    assert lost.calls == {name: {"replaced": 9}} and lost.calls_seen[name] == 18
    assert sum(s.name == name for s in tracer.samples()) == 9
    assert "make a new MoETracer" in " ".join(tracer.summary().notes)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as again:
        forwards(model)
    assert [s.assignments.tolist() for s in again.samples()] == [c.assignments(EXPERTS) for c in calls]
    assert not again.recording().lost.calls


def test_dtensors_are_read_where_each_process_holds_them_whole() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.MoETracer(model) as usual:
        forwards(model)
    with one_process() as mesh:
        for layer in model.model.layers:
            split_router(layer.mlp.gate, mesh, Replicate(), lambda out: out)
            take_local_parts(layer.mlp.experts)
        with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
            forwards(model)
        found = [s.assignments.tolist() for s in tracer.samples()]
    assert found == [s.assignments.tolist() for s in usual.samples()]
    assert not tracer.recording().lost.calls


def test_dtensors_that_are_split_are_lost_until_the_experts_get_whole_tensors() -> None:
    """The remedy is in the warning; asking for the other processes' parts would be a collective of ours."""
    model = tiny_olmoe(layers=1)
    with one_process() as mesh, torch.no_grad():
        gate, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts
        split_router(gate, mesh, Replicate(), lambda out: out.redistribute(mesh, [Shard(0)]))
        take_local_parts(experts)
        with pytest.warns(RuntimeWarning, match=r"full_tensor\(\)"), moe_trace.MoETracer(model) as tracer:
            forwards(model)
        (lost,) = tracer.recording().lost.calls.values()
        assert lost == {"unreduced": 9} and tracer.samples() == []
        split = gate.forward
        gate.forward = lambda hidden: tuple(out.full_tensor() for out in split(hidden))
        experts.forward = type(experts).forward.__get__(experts)
        with moe_trace.MoETracer(model) as again:
            forwards(model)
        assert len(again.samples()) == 9 and not again.recording().lost.calls


def take_local_parts(experts: nn.Module) -> None:
    inner = experts.forward
    experts.forward = lambda hidden, index, weights: inner(hidden, index.to_local(), weights.to_local())


def test_gradients_of_functions_are_recorded_and_vmap_is_counted() -> None:
    """Tensors of torch.func live as long as its call; what is left of them is read, or lost with a reason."""
    model = tiny_olmoe(layers=2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad(), moe_trace.MoETracer(model) as usual:
        forwards(model)

    def loss(parameters: Any, seed: int) -> Any:
        return torch.func.functional_call(model, parameters, (), token_batch(2, 3, seed=seed)).logits.sum()

    with moe_trace.MoETracer(model) as tracer:
        for seed in range(9):
            torch.func.grad(loss)(parameters, seed)
    counts = [s.assignments.tolist() for s in tracer.samples()]
    assert counts == [s.assignments.tolist() for s in usual.samples()]

    ids = torch.stack([token_batch(1, 4, seed=seed)["input_ids"] for seed in range(3)])
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="could not be reduced"):
        with moe_trace.MoETracer(model) as tracer:
            torch.vmap(lambda one: model(input_ids=one, use_cache=False).logits)(ids)
    lost = tracer.recording().lost
    assert sum(lost.calls_seen.values()) == 2 == sum(one["unreduced"] for one in lost.calls.values())
