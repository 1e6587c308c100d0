"""Recorder of routes: the expert ids of each token in the router calls that a tracer records.

look     copy the arguments that describe a forward's tokens             tokens.py, when it begins
take     cast the ids of many calls to one or two bytes on the device    chunks.py, when they are reduced
ship     copy them to pinned memory, followed by an event                with the recorder's own copies
settle   join them into rows of a forward, in bounded memory             blocks.py, once they have arrived
routes   make columns                                                    rows.py, on request
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.options import Routes
from moe_trace.find.contracts import AdapterMismatch
from moe_trace.find.routers import RouterSite, select_sites
from moe_trace.find.structure.router_beside_experts import ROUTER_BESIDE_EXPERTS
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.pending import PendingCalls
from moe_trace.record.calls.refusals import Refusals
from moe_trace.record.calls.settled_rows import settled_counts
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.forward.inputs import ModelInputs
from moe_trace.record.forward.isolation import warn_user
from moe_trace.record.forward.steps import Steps
from moe_trace.record.parallel.environment import versions
from moe_trace.record.parallel.process import ParallelModel
from moe_trace.record.routes.blocks import Block, Blocks
from moe_trace.record.routes.chunks import Chunk, cast
from moe_trace.record.routes.rows import Layers, as_routes
from moe_trace.record.routes.stream import RoutesStream
from moe_trace.record.routes.tokens import ForwardTokens, look_at_tokens, ship_tokens

_STREAMED_BYTES = 4 * 2**20  # bytes of rows that are kept before they are written to the file
_FORWARDS_OPEN = 2  # latest blocks, to which calls may still be added
_ON_DEVICE_MAX = 8 * 2**20  # bytes of ids on a device before their copies are started


class RoutesRecorder:
    """Recorder of the routes of one tracer. Its methods may be called from any thread.

    Args:
        sites: the routers whose routes are recorded.
        steps: the steps that are recorded; `options.every` counts those.
    """

    def __init__(
        self, options: Routes, sites: Sequence[RouterSite], steps: Steps, refusals: Refusals
    ) -> None:
        self.options = options
        self._steps, self._taken_back = steps, refusals.taken_back
        self._routers = {site.name: number for number, site in enumerate(sites)}
        self._layers = Layers(
            [site.name for site in sites],
            [site.info.num_experts for site in sites],
            [site.info.top_k for site in sites],
        )
        self._part = [int(".encoder." in f".{site.name}.") for site in sites]
        self._lost_order = (-1, -1)
        """Order of the last forward in a graph whose ids were lost."""
        self._runs = 0
        """Number of prefills and training forwards seen."""
        self._no_tokens = self._described = ForwardTokens()
        self._rows_first = all(site.contract is not ROUTER_BESIDE_EXPERTS for site in sites)
        """Whether routers see tokens batch-first; in other frameworks the sequence may come first."""
        self._blocks = Blocks(int(options.max_mib * 2**20), options.keep)
        self._dropped: Counter[str] = Counter()
        self.stream = None if options.path is None else RoutesStream(options.path, self._blocks.max_bytes)
        """Destination of complete rows; None if they stay in memory."""
        self._run: dict[str, Any] = {}
        self._on_device: list[Chunk] = []
        self._device_bytes = 0
        self._shipped: deque[Chunk] = deque()
        self._lock = threading.RLock()

    # -- called during a forward ----------------------------------------------------------------------

    def look(self, context: ForwardContext, inputs: ModelInputs, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what the arguments of a forward say about its tokens, when it begins or they are known."""
        if self._records_step(context.step):
            padding_T = None if context.batch is not None else context.padding_T
            tokens = look_at_tokens(inputs, args, kwargs, padding_T, token_ids=self.options.token_ids)
            if context.batch is not None:
                tokens.batch, context.tokens = context.batch, tokens
                return
            if not self._rows_first and tokens.rows > 1 and tokens.length > 1:
                tokens = ForwardTokens()
            self._runs += context.stage != "decode" and not tokens.continues
            context.tokens, tokens.run = tokens, self._runs

    def outside(self, step: int) -> ForwardTokens | None:
        """Return the empty description of tokens outside any forward, or None if the step is not recorded."""
        return self._no_tokens if self._records_step(step) else None

    def _records_step(self, step: int) -> bool:
        steps = self._steps
        return (step - steps.warmup) // steps.every % self.options.every == 0

    def take(self, group: PendingCalls) -> None:
        """Keep the ids of calls that were reduced. Does not synchronize and never raises."""
        with self._lock:
            try:
                self._take(group)
            except Exception as error:
                self._failed(len(group) * group.shape[0], error)

    def _take(self, group: PendingCalls) -> None:
        records: list[CallRecord] = []
        index, weights = [], []
        for record, index_TK, weights_TK in zip(group.records, group.index, group.weights, strict=True):
            router = self._routers.get(record.site.name)
            if record.tokens is None or router is None:
                continue
            if record.phase == "recompute":  # the same tokens again
                self._settle_arrived()
                self._blocks.recomputed(record, len(index_TK), self._part[router])
                continue
            records.append(record)
            index.append(index_TK)
            weights.append(weights_TK)
        if not records:
            return
        experts = records[0].site.info.num_experts or group.logits[0].shape[-1]
        chunk = cast(records, index, weights, experts, group.stream, keep_weights=self.options.weights)
        if not chunk.ids.is_cuda:
            ship_tokens(_tokens_of([chunk]))
            self._settle(chunk)
            return
        self._on_device.append(chunk)
        self._device_bytes += chunk.nbytes
        if self._device_bytes > _ON_DEVICE_MAX:
            self.ship()

    def ship(self) -> None:
        """Start the copies of all chunks on a device, and settle those that have arrived."""
        with self._lock:
            self._settle_arrived()
            ship_tokens(_tokens_of(self._on_device))
            for chunk in self._on_device:
                chunk.ship()
            self._shipped.extend(self._on_device)
            self._on_device.clear()
            self._device_bytes = 0

    # -- on the host ----------------------------------------------------------------------------------

    def _settle_arrived(self) -> None:
        while self._shipped and self._shipped[0].arrived:
            self._settle(self._shipped.popleft())

    def _settle(self, chunk: Chunk) -> None:
        ids_LTK, weights_LTK = chunk.arrays()
        for number, record in enumerate(chunk.records):
            router = self._routers[record.site.name]
            self._layers.learn(router, chunk.num_experts, ids_LTK.shape[-1])
            self._blocks.add(
                record,
                router,
                ids_LTK[number],
                None if weights_LTK is None else weights_LTK[number],
                part=self._part[router],
                lost=record.rows is not None and _is_contradicted(record, ids_LTK[number], chunk.num_experts),
            )
        if self.stream is not None and self._blocks.nbytes > _STREAMED_BYTES:
            self._stream(self._blocks.take(but=_FORWARDS_OPEN))

    def add_from_graph(self, record: CallRecord, found: tuple[Any, Any], tokens: int) -> None:
        """Add a call inside a graph that has been copied to the host.

        Args:
            record: record of the call, without `tokens` if the host did not see its forward begin.
            found: (ids, weights) [tokens, K], each None if not kept.
        """
        router, (ids, weights) = self._routers.get(record.site.name), found
        if router is None or not self._records_step(record.step):
            return
        with self._lock:
            record.tokens = record.tokens or self._tokens_of_batch(record)
            ship_tokens([record.tokens])
            if ids is None:
                if record.order != self._lost_order:  # once for all layers of a forward
                    self._dropped["in a graph"] += tokens
                self._lost_order = record.order
                return
            experts = record.site.info.num_experts or int(ids.max(initial=0)) + 1
            self._layers.learn(router, experts, ids.shape[-1])
            weights = weights if self.options.weights else None
            self._blocks.add(record, router, ids, weights, part=self._part[router])

    def _tokens_of_batch(self, record: CallRecord) -> ForwardTokens:
        """Return the description of a forward that the host did not see, one object for all its calls."""
        if record.batch is None:
            return self._no_tokens
        if self._described.batch is not record.batch:
            self._described = ForwardTokens(batch=record.batch)
        return self._described

    def _stream(self, blocks: list[Block]) -> None:
        """Queue blocks for writing; their columns are made on the writer's thread."""
        if self.stream is not None and blocks:
            self._mark_lost(blocks)
            layers, run = self._layers.copy(), self._run
            rows, nbytes = sum(block.rows for block in blocks), sum(block.nbytes for block in blocks)
            if self.stream.append(rows, nbytes, lambda: as_routes(blocks, layers, {}, run)):
                for block in blocks:
                    for router, call in block.decided():
                        self.stream.written.add(layers.names[router], range(call, call + 1))

    def _mark_lost(self, blocks: Sequence[Block]) -> None:
        """Mark the assignments of calls that were retracted since as unknown."""
        invalid, names = self._taken_back, self._layers.names
        for block in blocks if invalid.runs else ():
            block.lost.update(router for router, call in block.decided() if invalid.has(names[router], call))

    def _failed(self, tokens: int, error: Exception) -> None:
        if not self._dropped["failed"]:
            warn_user(
                f"routes could not be recorded ({type(error).__name__}: {error}); they are counted in "
                "`dropped`, and the model runs on"
            )
        self._dropped["failed"] += tokens

    def routes(self, model: Mapping[str, Any], parallel: ParallelModel) -> RecordedRoutes:
        """Return all routes; see `RecordedRoutes` for the arguments. Waits for the device."""
        ranks = {"rank": parallel.rank, "world_size": parallel.world_size}
        self._run = {"model": model, **ranks, "versions": versions()}
        with self._lock:
            self.ship()
            while self._shipped:
                self._settle(self._shipped.popleft())
            dropped = self._dropped + self._blocks.dropped
            if self.stream is None:
                self._mark_lost(self._blocks.blocks)
                return as_routes(self._blocks.blocks, self._layers, dropped, self._run)
            self._stream(self._blocks.take())
            self.stream.tell_taken_back(self._taken_back)
            found = self.stream.read() or as_routes([], self._layers, {}, self._run)
            return replace(found, dropped=dict(dropped + self.stream.dropped))


def routes_recorder(
    asked: bool | Routes, sites: Sequence[RouterSite], steps: Steps, refusals: Refusals
) -> RoutesRecorder | None:
    """Return a recorder of the requested routes, or None if none are requested.

    Raises:
        UsageError: `Routes.layers` selects nothing.
    """
    if not asked:
        return None
    options = Routes() if asked is True else asked
    return RoutesRecorder(options, select_sites(list(sites), options.layers), steps, refusals)


def _tokens_of(chunks: Sequence[Chunk]) -> list[ForwardTokens]:
    return list({id(record.tokens): record.tokens for chunk in chunks for record in chunk.records}.values())


def _is_contradicted(record: CallRecord, ids_TK: np.ndarray, num_experts: int) -> bool:
    """Return whether the rows that entered the experts contradict the ids, so that the routes are unknown."""
    assert record.rows is not None
    counts_E = np.bincount(ids_TK.ravel(), minlength=num_experts)[:num_experts]
    try:
        return not np.array_equal(settled_counts(record.rows, counts_E, len(ids_TK)), counts_E)
    except AdapterMismatch:
        return True
