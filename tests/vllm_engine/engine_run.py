"""Start vLLM's engine once on the demo model, and write the results to a JSON file.

python engine_run.py '{"out": ..., "phases": [...], "engine": {...}}'

Each phase generates greedily from the same prompts: `plain` with nothing else, `profile` between
start_profile and stop_profile, `rpc` under the worker extension. `oracle` watches what vLLM itself decides,
which only an engine in this process can. This script does not query moe_trace; its records are read
from the traces.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

LENGTHS = (40, 25, 31, 17)
TOKENS = 6


def prompts() -> list[dict[str, Any]]:
    from moe_trace.demo import DEMO_PROMPTS

    texts = DEMO_PROMPTS.values()
    return [
        {"prompt_token_ids": [byte + 3 for byte in text.encode()[:length]]}
        for text, length in zip(texts, LENGTHS, strict=True)
    ]


def generate(llm: Any) -> dict[str, Any]:
    """Tokens of each request."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts(), sampling, use_tqdm=False)
    return {"tokens": [list(one.outputs[0].token_ids) for one in outputs]}


class Oracle:
    """By layer, the counts of each call: by the gate's logits, and by the ids that vLLM captures."""

    def __init__(self, model: Any) -> None:
        import torch

        self.by_logits: dict[str, list[list[int]]] = {}
        self.captured: dict[str, list[list[int]]] = {}
        self._handles, self._routers = [], []
        for name, module in model.named_modules():
            if not hasattr(module, "routed_experts"):
                continue
            gate = model.get_submodule(name.rpartition(".")[0]).gate
            top_k, path = module.moe_config.experts_per_token, name.replace("experts", "gate")
            ours, theirs = self.by_logits.setdefault(path, []), self.captured.setdefault(path, [])

            def by_logits(_: Any, args: Any, output: Any, k: int = top_k, to: Any = ours) -> None:
                ids = output[0].float().softmax(-1).topk(k, dim=-1).indices
                to.append(torch.bincount(ids.flatten(), minlength=16).tolist())

            def captured(ids: Any, to: Any = theirs) -> None:
                to.append(torch.bincount(ids.flatten().long(), minlength=16).tolist())

            self._handles.append(gate.register_forward_hook(by_logits))
            module.router.set_capture_fn(captured)
            self._routers.append(module.router)

    def close(self) -> dict[str, Any]:
        for handle in self._handles:
            handle.remove()
        for router in self._routers:
            router.set_capture_fn(None)
        return {"by_logits": self.by_logits, "captured": self.captured}


class CompiledOracle:
    """The same where the model is compiled: ids are written into a buffer of ours, inside the compiled code,
    as vLLM's own capturer does. It must be there before vLLM compiles."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_worker import Worker

        self.calls: list[list[list[int]]] = []
        load, execute = Worker.load_model, Worker.execute_model

        def load_and_capture(worker: Any, *args: Any, **kwargs: Any) -> None:
            load(worker, *args, **kwargs)
            self._capture(worker.get_model())

        def execute_and_count(worker: Any, *args: Any, **kwargs: Any) -> Any:
            self.ids.fill_(-1)
            result = execute(worker, *args, **kwargs)
            if (self.ids >= 0).any():
                self.calls.append([ids[ids >= 0].bincount(minlength=16).tolist() for ids in self.ids])
            return result

        Worker.load_model, Worker.execute_model = load_and_capture, execute_and_count

    def _capture(self, model: Any) -> None:
        import torch

        runners = [module for module in model.modules() if hasattr(module, "routed_experts")]
        device = next(model.parameters()).device
        self.ids = torch.full((len(runners), 4096, 4), -1, dtype=torch.int64, device=device)
        for runner, ids_TK in zip(runners, self.ids, strict=True):

            def captured(ids: Any, to: Any = ids_TK) -> None:
                to[: ids.shape[0]].copy_(ids)

            runner.router.set_capture_fn(captured)

    def close(self) -> dict[str, Any]:
        """[calls][layers][E] since the last time."""
        calls, self.calls = self.calls, []
        return {"captured_steps": calls}


class OracleWorker:
    """The same in a worker of its own process, for `worker_extension_cls`."""

    def oracle_start(self) -> None:
        self.oracle = Oracle(self.get_model())  # type: ignore[attr-defined]

    def oracle_stop(self, out: str | None = None) -> dict[str, Any]:
        found = self.oracle.close()
        if out is not None:
            Path(out).write_text(json.dumps(found))
        return found


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def left_on(worker: Any) -> dict[str, list[str]]:
    """What of ours is on the model: hooks, and attributes of the routers and experts."""
    model = worker.get_model()
    hooks, attributes = [], []
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for hook in getattr(module, kind).values():
                if "moe_trace" in getattr(hook, "__module__", ""):
                    hooks.append(f"{name}.{kind}")
        for owner in (module, getattr(module, "router", None)):
            for key, value in vars(owner).items() if owner is not None else ():
                if type(value).__module__.startswith("moe_trace") or "moe_trace" in repr(
                    type(getattr(value, "__self__", None))
                ):
                    attributes.append(f"{name}: {key}")
    return {"hooks": hooks, "attributes": attributes}


def run_phase(llm: Any, phase: dict[str, Any], in_process: bool, compiled: Any) -> dict[str, Any]:
    kind, found = phase["kind"], {}
    options = phase.get("options", {})
    if not set(options) <= set(inspect.signature(llm.start_profile).parameters):
        kind, found = "plain", {"unsupported": True}  # by this version
    if compiled is not None:
        compiled.close()
    oracle = Oracle(worker_of(llm).get_model()) if phase.get("oracle") and in_process else compiled
    if phase.get("oracle") and not in_process:
        llm.collective_rpc("oracle_start")
    if kind == "profile":
        llm.start_profile(**options)
    if kind == "rpc":
        found["sites"] = llm.collective_rpc("moe_trace_start")
    if in_process:
        found["during"] = left_on(worker_of(llm))
    found |= generate(llm)
    if kind == "profile":
        llm.stop_profile()
    if kind == "rpc":
        found["counts"] = llm.collective_rpc("moe_trace_stop")
    if oracle is not None:
        found |= oracle.close()
    if phase.get("oracle") and not in_process:
        found["ranks"] = llm.collective_rpc("oracle_stop")
    if in_process:
        found["after"] = left_on(worker_of(llm))
    return found


def main() -> None:
    spec = json.loads(sys.argv[1])
    from vllm import LLM

    from moe_trace.demo import demo_path

    in_process = spec["engine"].get("distributed_executor_backend") == "uni"
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "seed": 0,
        "disable_log_stats": True,
    }
    compiled = CompiledOracle() if spec.get("compiled_oracle") else None
    llm = LLM(model=str(demo_path()), **(arguments | spec["engine"]))
    result: dict[str, Any] = {
        "phases": [run_phase(llm, phase, in_process, compiled) for phase in spec["phases"]]
    }
    if in_process:
        worker = worker_of(llm)
        result["wrapped"] = sorted(key for key, value in vars(worker).items() if callable(value))
        result["environment"] = os.environ.get("VLLM_USE_AOT_COMPILE")
    result["imported"] = sorted(name for name in sys.modules if name.startswith("moe_trace"))
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
