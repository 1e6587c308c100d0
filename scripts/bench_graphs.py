"""Workloads of `bench_overhead.py`: compiled decode, training, always-on scalars, and naive hooks.

Compiled code contains the hooks that were registered when it was compiled. Bare and traced are therefore two
compilations of the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from bench_pairs import Bench, Step, hooked, nothing, prefill_step

import moe_trace


class CompiledDecode:
    """Decode of one token per sequence, no cache, whole model compiled (on a GPU with CUDA graphs).

    The compiler rounds differently if the tracer's work is in the graph. With random weights other experts
    are then chosen, which changes the time of a grouped product. A single token would measure that, too.
    """

    STEPS = 50

    def __init__(self, bench: Bench, batch: int) -> None:
        self._model = bench.model
        self._tokens = cycle(bench.tokens(self.STEPS * batch, 1).split(batch))
        self._mode = "reduce-overhead" if bench.on_gpu else "default"
        self._forward: Any = None
        bench.model.set_experts_implementation("grouped_mm")

    def compiled(self, also: str = "") -> Any:
        """Return a compiled, warmed-up and captured function with the hooks that are registered now.

        Args:
            also: code of what the function returns besides the logits.
        """
        # Separate functions, so that they do not share a cache of compiled code.
        namespace: dict[str, Any] = {"model": self._model}
        exec(f"def forward(tokens):\n    return model(tokens, use_cache=False).logits{also}", namespace)
        forward = torch.compile(namespace["forward"], mode=self._mode, fullgraph=True)
        with self.using(forward)():
            for _ in range(4):
                self.step()
        return forward

    def using(self, forward: Any) -> Callable[[], Any]:
        """Return a context in which `step` runs `forward`."""

        @contextmanager
        def use() -> Iterator[None]:
            self._forward = forward
            yield

        return use

    @torch.no_grad()
    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self._forward(next(self._tokens))


def compiled_decode(bench: Bench, batch: int) -> None:
    decode = CompiledDecode(bench, batch)
    tracer = moe_trace.MoETracer(bench.model)
    bare = decode.compiled()
    tracer.start()
    traced = decode.compiled()
    # The tracer stays on. Code compiled before it has no hooks and does not see them. If the hooks were
    # removed, the traced half would be recompiled without them.
    before = len(tracer.samples())
    name = f"compiled decode, batch {batch}, {'CUDA graphs' if bench.on_gpu else 'no CUDA graphs'}"
    bench.compare(
        name,
        decode.step,
        bare=decode.using(bare),
        traced=decode.using(traced),
        bound=1.01,
        repeat=decode.STEPS,
    )
    assert len(tracer.samples()) > before, "the traced half must record"
    tracer.stop()
    # The hooks in the compiled code are now muted and available to the next tracer.
    bench.compare(
        f"{name}, after the tracer stopped",
        decode.step,
        bare=decode.using(bare),
        traced=decode.using(traced),
        bound=1.01,
        repeat=decode.STEPS,
    )
    torch._dynamo.reset()


def training_step(bench: Bench) -> Step:
    rows, length = (8, 1024) if bench.on_gpu else (2, 64)
    ids = bench.tokens(rows, length)
    bench.model.train()
    bench.model.gradient_checkpointing_enable()

    def step() -> None:
        bench.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        bench.model.zero_grad(set_to_none=True)

    return step


def no_more_training(bench: Bench) -> None:
    """Remove the hook that checkpointing leaves on the embedding, which dynamo cannot compile."""
    bench.model.eval()
    bench.model.gradient_checkpointing_disable()
    bench.model.disable_input_require_grads()


def training(bench: Bench) -> None:
    step = training_step(bench)
    bench.compare("training step, checkpointing", step, bare=nothing, traced=hooked(bench), bound=1.002)
    no_more_training(bench)


def scalars(bench: Bench) -> None:
    """Measure writing scalars to TensorBoard in every step, over the writer's period on a GPU."""
    plain = training_step(bench)
    logger: list[Any] = []

    @contextmanager
    def logging() -> Iterator[None]:
        with tempfile.TemporaryDirectory() as folder, moe_trace.MoETracer(bench.model) as tracer:
            with moe_trace.ScalarLogger(tracer, folder) as running:
                logger[:] = [running]
                yield
                logger.clear()

    def step() -> None:
        plain()
        if logger:
            logger[0].step()

    bench.compare(
        "always-on scalars, training step", step, bare=nothing, traced=logging, bound=1.005, repeat=12
    )
    no_more_training(bench)


def usual(bench: Bench) -> None:
    """Measure common naive hooks for comparison: one synchronizes, and one loops over the tokens."""

    def counting(look: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        @contextmanager
        def use() -> Iterator[None]:
            def hook(module: Any, args: Any) -> None:  # a return value would replace the arguments
                look(args[1])

            handles = [
                layer.mlp.experts.register_forward_pre_hook(hook) for layer in bench.model.model.layers
            ]
            yield
            for handle in handles:
                handle.remove()

        return use

    experts = bench.model.config.num_experts

    def wait(index: torch.Tensor) -> Any:
        return torch.bincount(index.cpu().flatten(), minlength=experts).tolist()

    def loop(index: torch.Tensor) -> Any:
        counts = [0] * experts
        for token in index:
            for expert in token:
                counts[int(expert)] += 1
        return counts

    ids = bench.tokens(1, 128)

    @torch.no_grad()
    def short() -> None:
        bench.model(ids, use_cache=False)

    long = prefill_step(bench)
    bench.compare(
        "usual: .cpu() in the hook, long forward", long, bare=nothing, traced=counting(wait), bound=None
    )
    bench.compare(
        "usual: .cpu() in the hook, 128 tokens", short, bare=nothing, traced=counting(wait), bound=None
    )
    bench.compare("usual: loop over 128 tokens", short, bare=nothing, traced=counting(loop), bound=None)
    bench.compare("moe_trace, 128 tokens", short, bare=nothing, traced=hooked(bench), bound=None)


WORKLOADS: dict[str, Callable[[Bench], None]] = {
    "decode1": lambda bench: compiled_decode(bench, 1),
    "decode64": lambda bench: compiled_decode(bench, 64),
    "usual": usual,
    "training": training,
    "scalars": scalars,
}
