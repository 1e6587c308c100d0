"""Warm up the recording on synthetic calls, so that no training or inference step pays one-time costs.

First use is slow on a GPU: kernels are compiled or loaded, and pinned memory is allocated. Each of these is
therefore used once when a tracer starts, before a profiler records, through the recorder's own code path and
once per kind of router and process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from moe_trace.find.contracts import RouterOutput
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.recorder import SHIP_EVERY, WAITING_CALLS_MAX, Recorder
from moe_trace.record.forward.ranges import profiler_is_recording
from moe_trace.record.graphs.memory import is_capturing
from moe_trace.record.reduce.kernel_cache import FUSED
from moe_trace.record.reduce.stats import routing_stats

_TOKENS = 512

_Kind = tuple[torch.device, torch.dtype, int, int]  # device and dtype of the weights, experts, top-k
_warm: set[_Kind] = set()


def warm_up(sites: Sequence[RouterSite]) -> None:
    """Run what recording calls of these routers will run. Does nothing on a CPU or for kinds already warm.

    Does nothing while a profiler records either, because its trace would contain the warm-up. Torch's
    operators then replace kernels that are not ready.
    """
    if not torch.cuda.is_available() or profiler_is_recording():
        return
    kinds: dict[_Kind, list[RouterSite]] = defaultdict(list)
    for site in sites:
        weight = next(site.router.parameters(), None)
        if weight is not None and weight.is_cuda and site.info.num_experts and site.info.top_k:
            kinds[weight.device, weight.dtype, site.info.num_experts, site.info.top_k].append(site)
    for kind, same_kind in kinds.items():
        if kind not in _warm and not is_capturing(kind[0]):
            _warm.add(kind)
            _warm_up(*kind, same_kind)


@torch.no_grad()
def _warm_up(
    device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int, sites: list[RouterSite]
) -> None:
    FUSED.prepare(device, num_experts, top_k)
    try:
        recorder = Recorder(capacity=SHIP_EVERY * len(sites) + 2 * WAITING_CALLS_MAX)
        forward = _reading(device, dtype, _TOKENS, num_experts, top_k)
        for _ in range(SHIP_EVERY):  # enough calls to ship a batch as well
            _add(recorder, sites, forward)
        decode = _reading(device, dtype, 1, num_experts, top_k)
        _add(recorder, (sites * (WAITING_CALLS_MAX // len(sites) + 1))[:WAITING_CALLS_MAX], decode)
        shipped = recorder.take()  # kept alive, so that a single step is shipped to separate memory
        _add(recorder, sites, forward)
        shipped += recorder.take()
        ring = _reading(device, torch.float32, 4, num_experts, top_k)
        assert ring.logits_TE is not None
        stacked = (
            torch.stack([tensor] * len(sites)) for tensor in (ring.logits_TE, ring.weights_TK, ring.index_TK)
        )
        logits, weights, index = stacked
        routing_stats(logits, weights, index, num_experts, None)
        if device.type == "cuda":  # otherwise kernels might end within the user's trace
            torch.cuda.current_stream(device).synchronize()
    except RuntimeError:  # out of memory, or an operator missing here: the model's step will report it
        return


def _reading(
    device: torch.device, dtype: torch.dtype, tokens: int, num_experts: int, top_k: int
) -> RouterOutput:
    return RouterOutput(
        index_TK=torch.zeros((tokens, top_k), dtype=torch.int64, device=device),
        weights_TK=torch.ones((tokens, top_k), dtype=dtype, device=device),
        logits_TE=torch.zeros((tokens, num_experts), dtype=dtype, device=device),
    )


def _add(recorder: Recorder, sites: Sequence[RouterSite], reading: RouterOutput) -> None:
    for site in sites:
        record = CallRecord(site, 0, 0, "forward", "prefill", 0, 0, 0, profiled=False)
        recorder.add(record, reading)
    recorder.reduce()
