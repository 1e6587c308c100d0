"""Worker extension for vLLM, for use through `collective_rpc` without any patching.

    llm = LLM(..., worker_extension_cls="moe_trace.integrations.vllm.extension.MoETraceWorker")
    llm.collective_rpc("moe_trace_start")
    llm.start_profile(); llm.generate(...); llm.stop_profile()
    llm.collective_rpc("moe_trace_stop")

It records in eager mode (`enforce_eager=True`): code that vLLM compiled before contains no hooks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_trace.data.errors import UsageError
from moe_trace.find.contracts.engines.vllm import remove_taps
from moe_trace.integrations.vllm.tokens import StepTokens, tell_tokens
from moe_trace.integrations.vllm.worker import compiles
from moe_trace.record.tracer import MoETracer


class MoETraceWorker:
    """Methods added to each worker. Their return values can be sent to another process."""

    _moe_tracer: MoETracer | None = None
    _moe_tokens: StepTokens | None = None

    def moe_trace_start(self, **options: Any) -> list[str]:
        """Hook the routers; torch profilers that record from now on have the routing in their traces.

        Args:
            options: arguments of `MoETracer`, such as `every` and `routes`.

        Returns:
            The module paths of the routers.

        Raises:
            UsageError: it is already recording, or vLLM has compiled its model.
            NoRoutersFound: the model has no routers.
        """
        if self._moe_tracer is not None:
            raise UsageError("moe_trace records already in this worker; call moe_trace_stop first")
        if compiles(getattr(self, "vllm_config", None)):
            raise UsageError(
                "vLLM has compiled its model, without hooks; give enforce_eager=True, or leave the recording "
                "to moe_trace's plugin, which is there when vLLM compiles (profiler_config=)"
            )
        tracer = MoETracer(self.get_model(), **options)  # type: ignore[attr-defined]
        self._moe_tokens = tell_tokens(tracer, self)
        tracer.start()
        self._moe_tracer = tracer
        return [site.name for site in tracer.sites]

    def moe_trace_stop(self, trace: str | None = None) -> dict[str, list[list[int]]]:
        """Stop recording and remove all hooks.

        Args:
            trace: path of a trace that another profiler wrote meanwhile, to merge the routing into.

        Returns:
            By module path of the router: the tokens per expert of each call, [calls][E].

        Raises:
            UsageError: nothing is being recorded.
            MoETraceError: the trace cannot be merged into; it is left unchanged.
        """
        tracer = self._moe_tracer
        if tracer is None:
            raise UsageError("moe_trace does not record in this worker; call moe_trace_start first")
        self._moe_tracer = None
        tracer.stop()
        if self._moe_tokens is not None:
            self._moe_tokens.leave()
        remove_taps(tracer.model)
        if trace is not None:
            tracer.merge_into(Path(trace))
        counts: dict[str, list[list[int]]] = {site.name: [] for site in tracer.sites}
        for sample in tracer.samples():
            counts[sample.name].append(sample.assignments.tolist())
        return counts
