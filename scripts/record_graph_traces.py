#!/usr/bin/env python3
"""Record small GPU traces of compiled code and CUDA graphs: OLMoE-1B-7B's true shape, a few layers.

    python scripts/record_graph_traces.py --out tests/data/h200_graphs
    python scripts/record_graph_traces.py --cpu --out tests/data/cpu_compiled   # small layers, no GPU

In these folders, traces of a torch other than the pinned one have its version in their names.

Each trace is merged as by `prof.export_chrome_trace`, with a range `moe.graph/...` around each forward that
the host sees. Prints the number of placed calls, and why other calls were not placed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record_gpu_traces import tokens, true_shape
from transformers import OlmoeForCausalLM

import moe_trace

STEPS = 3
BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
Replay = Callable[[], None]


def compiled_model(model: OlmoeForCausalLM) -> Replay:
    return _calls(torch.compile(model, mode="reduce-overhead", fullgraph=True), model)


def compiled_function(model: OlmoeForCausalLM) -> Replay:
    """Compile a function that calls the model, so that even the model's own hooks are inside the graph."""

    def next_logits(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return model(ids, **options).logits

    return _calls(torch.compile(next_logits, mode="reduce-overhead", fullgraph=True), model)


def compiled_layers(model: OlmoeForCausalLM) -> Replay:
    for layer in model.model.layers:
        layer.compile(mode="reduce-overhead", fullgraph=True)
    return _calls(model, model)


def without_graphs(model: OlmoeForCausalLM) -> Replay:
    """Compile without CUDA graphs, so that kernels are launched one by one."""
    return _calls(torch.compile(model, fullgraph=True), model, batch=4, length=16)


def layers_without_graphs(model: OlmoeForCausalLM) -> Replay:
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    return _calls(model, model, batch=4, length=16)


def compiled_blocks(model: OlmoeForCausalLM) -> Replay:
    """Compile only the MoE blocks, as regional compilation does."""
    for layer in model.model.layers:
        layer.mlp.compile(fullgraph=True)
    return _calls(model, model, batch=4, length=16)


def compiled_router(model: OlmoeForCausalLM) -> Replay:
    """Compile only the routers; the experts run eagerly."""
    for layer in model.model.layers:
        layer.mlp.gate.compile(fullgraph=True)
    return _calls(model, model, batch=4, length=16)


def compiled_experts(model: OlmoeForCausalLM) -> Replay:
    """Compile only the experts; the routers run eagerly."""
    for layer in model.model.layers:
        layer.mlp.experts.compile(fullgraph=True)
    return _calls(model, model, batch=4, length=16)


def compiled_training(model: OlmoeForCausalLM) -> Replay:
    """Run forward and backward of a model that is compiled as a whole."""
    return _training(torch.compile(model, fullgraph=True), model)


def training_with_graphs(model: OlmoeForCausalLM) -> Replay:
    """Run compiled forward and backward in CUDA graphs."""
    return _training(torch.compile(model, mode="reduce-overhead", fullgraph=True), model)


def training_layers(model: OlmoeForCausalLM) -> Replay:
    """Run forward and backward with each layer compiled separately."""
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    return _training(model, model)


def _training(forward: Any, model: OlmoeForCausalLM) -> Replay:
    ids = tokens(4, 16, model.device)

    @torch.enable_grad()
    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    for _ in range(4):
        run()
    return run


def _calls(forward: Any, model: OlmoeForCausalLM, batch: int = 1, length: int = 1) -> Replay:
    ids = tokens(batch, length, model.device)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(ids, use_cache=False)

    for _ in range(4):
        run()
    return run


def by_hand(model: OlmoeForCausalLM) -> Replay:
    """Capture one forward by hand into a graph; each replay is a step."""
    ids = tokens(4, 16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, use_cache=False)
    return graph.replay


ON_A_CPU = ["without_graphs", "layers_without_graphs", "compiled_training", "training_layers"]
WORKLOADS: dict[str, Callable[[OlmoeForCausalLM], Replay]] = {
    "compiled_model": compiled_model,
    "compiled_layers": compiled_layers,
    "compiled_function": compiled_function,
    "by_hand": by_hand,
    "without_graphs": without_graphs,
    "layers_without_graphs": layers_without_graphs,
    "compiled_blocks": compiled_blocks,
    "compiled_training": compiled_training,
    "compiled_router": compiled_router,
    "compiled_experts": compiled_experts,
    "training_with_graphs": training_with_graphs,
    "training_layers": training_layers,
}


@torch.no_grad()
def record(name: str, model: OlmoeForCausalLM, out: Path) -> None:
    torch._dynamo.reset()
    with moe_trace.MoETracer(model) as tracer:
        run = WORKLOADS[name](model)
        run()
        on_device = model.device.type == "cuda"
        wait = torch.cuda.synchronize if on_device else lambda: None
        wait()
        with torch.profiler.profile(activities=BOTH if on_device else BOTH[:1]) as prof:
            tracer.attach(prof)
            for _ in range(STEPS):
                run()
                prof.step()
            wait()
        target = out / f"{name}.pt.trace.json.gz"
        prof.export_chrome_trace(str(target))
        _print(target, tracer)
    for layer in model.model.layers:
        for module in (layer, layer.mlp, layer.mlp.gate, layer.mlp.experts):
            module._compiled_call_impl = None


def _print(target: Path, tracer: moe_trace.MoETracer) -> None:
    placements = [s.placement for s in tracer.exported_samples if s.placement is not None]
    timed = sum("router" in {**placement.host, **placement.device} for placement in placements)
    recording = tracer.recording()
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")
    print(f"  {len(tracer.exported_samples)} calls, {len(placements)} placed, {timed} routers timed")
    for why, count in (*recording.lost.unplaced.items(), *recording.lost.untimed.items()):
        print(f"  {count}: {why}")
    for compiled in recording.compiled_graphs:
        print(f"  compiled: {len(compiled.launches)} launches, {len(compiled.parts)} parts")
    for graph in recording.captured_graphs:
        print(f"  captured: {graph.nodes} nodes, {len(graph.calls)} calls, problem: {graph.problem}")


def _large(layers: int) -> OlmoeForCausalLM:
    with torch.device("cuda"):
        return OlmoeForCausalLM(true_shape(layers)).to(torch.bfloat16).eval()


def _small(layers: int) -> OlmoeForCausalLM:
    config = true_shape(layers)
    config.update({"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 4})
    return OlmoeForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS))
    parser.add_argument(
        "--cpu", action="store_true", help="record a small model, with ranges of the C++ kernels"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = _small(arguments.layers) if arguments.cpu else _large(arguments.layers)
    model.set_experts_implementation("grouped_mm")
    torch._inductor.config.cpp.enable_kernel_profile = arguments.cpu
    failed = []
    for name in arguments.only or (ON_A_CPU if arguments.cpu else WORKLOADS):
        try:
            record(name, model, arguments.out)
        except Exception:  # continue with the others
            traceback.print_exc()
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
