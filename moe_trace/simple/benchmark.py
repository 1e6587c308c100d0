"""`SimpleBenchmark`: run the same texts through one model under several configurations."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.data.display.progress import progress_bar
from moe_trace.data.errors import NothingRecorded, UsageError
from moe_trace.find.routers import LayerSelector
from moe_trace.simple.comparison import Comparison, Measurement, compare
from moe_trace.simple.metrics import NAN
from moe_trace.simple.model_state import ModelState
from moe_trace.simple.profiler import MoEProfiler

ConfigFn = Callable[[nn.Module], Any]
"""Function that changes the model in place. It may return a context manager (such as `replace_router`'s) to
enter for the measurement, or another module to run instead, whose routers are then examined.
"""


@dataclass(frozen=True)
class _Config:
    name: str
    texts: dict[str, str]
    change: ConfigFn | None


class SimpleBenchmark:
    """Measure configurations of a model against each other, in interleaved order.

        benchmark = SimpleBenchmark(model, tokenizer)
        benchmark.run_config("as trained", texts)
        benchmark.run_config("two experts", texts, lambda model: replace_router(model, top_k(2)))
        print(benchmark.compare())

    `run_config` runs its configuration once, so that mistakes show at once; `compare` then measures all of
    them in turn, `repeats` times. Each measurement is two forwards per text, in eval mode and without
    gradients: one without hooks, for the wall time, and one with `MoEProfiler`, for the routing.

    Args:
        model: the model that contains the routers. Its state is restored afterwards, bit for bit.
        tokenizer: called as `tokenizer(text, return_tensors="pt")`.
        repeats: number of rounds that `compare` measures.
        warmup: number of discarded forwards per text before each measurement.
        layers: routers to examine; None selects all.
        progress: whether to show a bar; None shows it on a terminal or in a notebook.

    Raises:
        NoRoutersFound: the model contains no router that a known contract can read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        repeats: int = 9,
        warmup: int = 1,
        layers: LayerSelector = None,
        progress: bool | None = None,
    ) -> None:
        if repeats < 1 or warmup < 0:
            raise UsageError(
                f"expected repeats >= 1 and warmup >= 0, found repeats={repeats}, warmup={warmup}"
            )
        MoEProfiler(model, layers=layers)  # fails early without routers or with a wrong layers=
        self.model, self.tokenizer = model, tokenizer
        self.repeats, self.warmup, self.layers = repeats, warmup, layers
        self._progress = progress
        self._configs: dict[str, _Config] = {}
        self._rounds: list[list[Measurement]] = []

    def run_config(
        self, name: str, texts: str | Sequence[str] | Mapping[str, str], config_fn: ConfigFn | None = None
    ) -> list[Measurement]:
        """Run a configuration once and keep it for `compare`, replacing one of the same name.

        Args:
            texts: one text, a list, or a dict of name -> text.
            config_fn: see `ConfigFn`; its changes are undone before this returns.

        Returns:
            One measurement per text, without repetition; use `compare` for results.

        Raises:
            UsageError: there is no text, or one is empty.
            NothingRecorded: no router was called.
        """
        config = _Config(name, _named_texts(texts), config_fn)
        taken = self._measure(config, self._state_for([config]))
        self._configs[name] = config
        self._rounds = []
        return taken

    def compare(self, csv: str | os.PathLike[str] | None = None, *, by_text: bool = False) -> Comparison:
        """Compare the configurations; ratios are relative to the first one.

        Measures only if there is something new to measure, and keeps the results.

        Args:
            csv: path to write the table to as well.
            by_text: one line per configuration and text, each relative to the first configuration on that
                text.

        Raises:
            UsageError: `run_config` was never called.
        """
        if not self._configs:
            raise UsageError("there is nothing to compare: call run_config(name, texts) first")
        if not self._rounds:
            self._rounds = self._measure_rounds()
        comparison = compare(self._rounds, by_text=by_text)
        if csv is not None:
            comparison.to_csv(csv)
        return comparison

    def _measure_rounds(self) -> list[list[Measurement]]:
        configs = list(self._configs.values())
        rounds = []
        state = self._state_for(configs)
        total = self.repeats * len(configs)
        with progress_bar(self._progress) as tell:
            for done in range(self.repeats):
                taken: dict[str, list[Measurement]] = {}
                # Every other round is reversed, so that no configuration always follows the same one.
                for config in configs if done % 2 == 0 else reversed(configs):
                    tell(f"round {done + 1}: {config.name}", done * len(configs) + len(taken), total)
                    taken[config.name] = self._measure(config, state)
                rounds.append([m for config in configs for m in taken[config.name]])
            tell("measured", total, total)
        return rounds

    def _state_for(self, configs: Sequence[_Config]) -> ModelState | None:
        """Return the state to restore. It copies all weights, so it is None where nothing is changed."""
        return ModelState(self.model) if any(config.change is not None for config in configs) else None

    def _measure(self, config: _Config, state: ModelState | None) -> list[Measurement]:
        with self._configured(config.change, state) as model, torch.no_grad():
            return [self._measure_text(model, config, name, text) for name, text in config.texts.items()]

    @contextmanager
    def _configured(self, change: ConfigFn | None, state: ModelState | None) -> Iterator[nn.Module]:
        """Yield the changed model in eval mode, and restore it afterwards."""
        if change is None or state is None:
            modes = [(module, module.training) for module in self.model.modules()]
            try:
                yield self.model.eval()
            finally:
                for module, training in modes:
                    module.training = training
            return
        try:
            self.model.eval()
            returned = change(self.model)
            entered = returned if hasattr(returned, "__exit__") else nullcontext()
            with entered:
                yield returned.eval() if isinstance(returned, nn.Module) else self.model
        finally:
            state.restore()

    def _measure_text(self, model: nn.Module, config: _Config, name: str, text: str) -> Measurement:
        inputs = self._inputs(text)
        for _ in range(self.warmup):
            model(**inputs)
        bare_ms = _timed_forward_ms(model, inputs)
        profiler = MoEProfiler(model, layers=self.layers)
        with profiler:
            model(**inputs)
        rows = profiler.rows()
        if not rows:
            raise NothingRecorded(f"configuration {config.name!r}: {profiler.notes()[0]}")
        samples = [s for metrics in profiler.get_metrics().values() for s in metrics.samples]
        slots = sum(s.tokens * s.top_k for s in samples)
        return Measurement(
            config=config.name,
            text=name,
            tokens=int(inputs["input_ids"].numel()),
            latency_ms=bare_ms,
            router_ms=sum(row.latency_ms for row in rows),
            experts_ms=sum(row.experts_ms for row in rows),
            flops_per_token=sum(row.flops_total / row.tokens for row in rows),
            load_max_over_mean=_mean(row.load_max_over_mean for row in rows),
            router_confidence=_mean(row.router_conf for row in rows),
            k_mean=_mean(row.k_avg for row in rows),
            skipped_share=sum(s.skipped for s in samples) / slots,
        )

    def _inputs(self, text: str) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        encoded = self.tokenizer(text, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in encoded.items()}


def _named_texts(texts: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(texts, str):
        by_name = {"text 1": texts}
    elif isinstance(texts, Mapping):
        by_name = dict(texts)
    else:
        by_name = {f"text {i + 1}": text for i, text in enumerate(texts)}
    if not by_name or not all(isinstance(text, str) and text for text in by_name.values()):
        raise UsageError("expected texts to be a text, a list of texts or a dict of name -> text, none empty")
    return by_name


def _timed_forward_ms(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    _wait(inputs)
    start = time.perf_counter_ns()
    model(**inputs)
    _wait(inputs)
    return (time.perf_counter_ns() - start) / 1e6


def _wait(inputs: dict[str, Tensor]) -> None:
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize(inputs["input_ids"].device)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN
