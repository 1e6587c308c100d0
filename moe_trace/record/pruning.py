"""Pruning scores: contribution of each expert to its layer's output, measured on the expert's own outputs.

Over the tokens x routed to expert j, with gating weight g_j(x) and expert output f_j(x) before weighting:

    REAP_j = mean of g_j(x) * ||f_j(x)||_2      (router-weighted expert activation pruning, arXiv 2510.13999)
    EAN_j  = mean of ||f_j(x)||_2               (expert activation norm)

The number of those tokens (frequency) and the sum of g_j(x) (gate mass) are reported as well. Kernels return
only the sum over experts, so each expert's output is computed a second time, slot by slot: measuring costs
about as much again as the experts' forward, plus memory for the outputs of one slot, [T, H]. The second
computation is checked against the model's: where the weighted outputs do not add up to the layer's output,
the layer gets no scores, and `unscored` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_trace.data.display.json import json_text
from moe_trace.data.errors import UsageError
from moe_trace.data.files import whole_file
from moe_trace.find.contracts import Call, RouterOutput
from moe_trace.find.contracts.modules import forward_parameters, unwrapped
from moe_trace.find.private.torch_names import graph_task_id
from moe_trace.find.routers import LayerSelector, RouterSite, find_routers
from moe_trace.record.forward.inputs import ModelInputs
from moe_trace.record.forward.isolation import apart

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """Scores of the experts of one layer."""

    tokens: int
    """Number of tokens, without padding."""
    frequency: npt.NDArray[np.int64]
    """[E] number of tokens routed to each expert, without skipped slots."""
    gate_mass: npt.NDArray[np.float64]
    """[E] sum of the gating weights of those tokens."""
    ean: npt.NDArray[np.float64]
    """[E] mean norm of the expert's outputs; NaN for an expert never chosen."""
    reap: npt.NDArray[np.float64]
    """[E] mean of gating weight times norm; NaN for an expert never chosen."""


class PruningScores:
    """Measure the scores of every expert over the forwards of `model` inside a `with` block.

        with moe_trace.PruningScores(model) as scores:
            for batch in batches:
                model(**batch)
        scores.save("scores.json")

    Gradients, the model's output and its random numbers are unchanged. The model must run eagerly: compiled
    forwards and CUDA graphs do not call hooks.

    Args:
        model: any model whose routers `find_routers` finds.
        layers: selection of routers, as for `MoETracer`.

    Raises:
        NoRoutersFound: the model has no known router.
        UsageError: `layers` selects no router.
    """

    def __init__(self, model: nn.Module, *, layers: LayerSelector = None) -> None:
        self._model, self._sites = model, find_routers(model, layers=layers)
        self._inputs = ModelInputs(model)
        self._padding_T: Tensor | None = None
        self._tokens: Counter[str] = Counter()
        self._totals: dict[str, npt.NDArray[np.float64]] = {}
        """[4, E] per router: tokens, weights, norms, weights times norms."""
        self._handles: list[Any] = []
        self.unscored: dict[str, str] = {}
        """Mapping from the module path of a router whose experts could not be scored to the reason."""

    def __enter__(self) -> PruningScores:
        add = self._handles.append
        add(self._model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for site in self._sites:
            scored = _Listed(site) if site.listed else _Stacked(site)
            try:
                scored.hook(partial(self._measure, site, scored), add)
            except ValueError as error:
                self.unscored[site.name] = str(error)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._padding_T = None

    @property
    def layers(self) -> dict[str, ExpertScores]:
        """Scores so far, by module path of the router."""
        return {
            name: _scores(tokens, self._totals[name])
            for name in (site.name for site in self._sites)
            if name not in self.unscored and (tokens := self._tokens[name])
        }

    def save(self, path: str | Path) -> None:
        """Write the scores to a `.json` file, or to an `.npz` file with arrays named `<module path>/<score>`.

        Raises:
            UsageError: the path has another suffix.
        """
        suffix = Path(path).suffix
        if suffix not in (".json", ".npz"):
            raise UsageError(f"found {path}, expected a file name that ends in .json or .npz")
        with whole_file(path) as temporary:
            if suffix == ".json":
                text = json_text({"layers": self.layers, "unscored": self.unscored})
                temporary.write_text(text, encoding="utf-8")
            else:
                arrays: Any = {
                    f"{name}/{key}": value
                    for name, scores in self.layers.items()
                    for key, value in vars(scores).items()
                }
                with open(temporary, "wb") as file:
                    np.savez_compressed(file, **arrays)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._padding_T, _ = self._inputs.padding(args, kwargs)

    def _measure(self, site: RouterSite, scored: _Stacked | _Listed, *seen: Any) -> None:
        if site.name in self.unscored or graph_task_id() != -1:  # recomputation in a backward pass
            return
        try:
            with apart(), torch.no_grad(), torch.random.fork_rng(enabled=self._model.training):
                found = scored.norms(*seen)
        except Exception as error:  # a model's own code may raise anything when called again
            self.unscored[site.name] = str(error) or type(error).__name__
            return
        if found is not None:
            self._add(site, *found)

    def _add(self, site: RouterSite, choice: RouterOutput, norm_TK: Tensor) -> None:
        name, experts = site.name, site.info.num_experts
        index_TK, weights_TK = choice.index_TK.detach().cpu(), choice.weights_TK.detach().double().cpu()
        used_TK = (index_TK >= 0) & (index_TK < experts) & (weights_TK != 0)
        tokens = len(index_TK)
        padding_T = self._padding_T
        if padding_T is not None and len(padding_T) == tokens:
            used_TK &= ~padding_T.cpu()[:, None]
            tokens -= int(padding_T.sum())
        ids = index_TK[used_TK].numpy()
        weights, norms = weights_TK[used_TK].numpy(), norm_TK.double().cpu()[used_TK].numpy()
        columns = (np.ones_like(norms), weights, norms, weights * norms)
        totals = np.array([np.bincount(ids, column, minlength=experts) for column in columns])
        self._totals[name] = self._totals.get(name, 0.0) + totals
        self._tokens[name] += tokens


def _scores(tokens: int, totals: npt.NDArray[np.float64]) -> ExpertScores:
    count, mass, norms, weighted = totals
    with np.errstate(invalid="ignore", divide="ignore"):
        return ExpertScores(tokens, count.astype(np.int64), mass, norms / count, weighted / count)


@dataclass
class _Stacked:
    """Experts in one module, `experts(hidden_states, index, weights)`, called per slot with weights of 1."""

    site: RouterSite

    def hook(self, measure: Callable[..., None], add: Callable[[Any], None]) -> None:
        """Register a hook that measures each call of the experts."""
        experts = self.site.experts
        if experts is None or self.site.contract.name != "topk-experts" or not self.site.times_experts:
            raise ValueError(f"experts of the kind '{self.site.contract.name}' are not scored")
        add(experts.register_forward_hook(measure, with_kwargs=True))

    def norms(
        self, experts: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> tuple[RouterOutput, Tensor] | None:
        """Return the decision and the [T, K] norms of the outputs of one call."""
        named = [kwargs[name] for name in forward_parameters(unwrapped(experts)) if name in kwargs]
        arguments = [*args, *named]
        if len(arguments) != 3 or not isinstance(output, Tensor):
            raise ValueError(
                f"expected experts(hidden_states, index, weights), found {len(arguments)} arguments"
            )
        hidden, index_TK, weights_TK = arguments
        if index_TK.dim() != 2 or index_TK.shape != weights_TK.shape:
            raise ValueError("expected an index and weights of one shape [T, K]")
        norms, total = [], torch.zeros_like(output, dtype=torch.float32)
        for slot in range(index_TK.shape[1]):
            ones = weights_TK.new_ones(len(index_TK), 1)
            try:
                single = experts.forward(hidden, index_TK[:, slot : slot + 1].contiguous(), ones).float()
            except (ValueError, IndexError, RuntimeError) as error:
                raise ValueError(f"the experts cannot be called for one slot alone ({error})") from error
            norms.append(single.reshape(len(index_TK), -1).norm(dim=1))
            total += (single.reshape(len(index_TK), -1) * weights_TK[:, slot, None].float()).view_as(total)
        if not _adds_up(total, output):
            raise ValueError(_NOT_THE_SUM)
        return RouterOutput(index_TK, weights_TK, None), torch.stack(norms, dim=1)


@dataclass
class _Listed:
    """Experts in a module each, which are called on their tokens after the block has run."""

    site: RouterSite
    call: Call | None = None
    rows: Counter[int] = field(default_factory=Counter)

    def hook(self, measure: Callable[..., None], add: Callable[[Any], None]) -> None:
        """Register hooks that keep the router's last call and measure each call of the block."""
        if self.site.block is None:
            raise ValueError("the block that holds the experts is not called as a module")
        add(self.site.router.register_forward_hook(self._keep))
        for number, expert in enumerate(self.site.listed):
            add(expert.register_forward_pre_hook(partial(self._count, number)))
        add(self.site.block.register_forward_hook(measure))

    def _keep(self, router: nn.Module, args: Any, output: Any) -> None:
        self.call = Call(router_args=args, router_output=output)
        self.rows.clear()

    def _count(self, number: int, expert: nn.Module, args: Any) -> None:
        self.rows[number] += args[0].shape[:-1].numel() if args and isinstance(args[0], Tensor) else 0

    def norms(self, block: nn.Module, args: Any, output: Any) -> tuple[RouterOutput, Tensor] | None:
        """Return the decision and the [T, K] norms of the outputs of one call."""
        call, self.call = self.call, None
        if call is None or not call.router_args:
            return None
        call.expert_rows = tuple(self.rows[number] for number in range(len(self.site.listed)))
        choice = self.site.read(call)
        hidden_TH = call.router_args[0].flatten(0, -2)
        index_TK = choice.index_TK
        if len(hidden_TH) != len(index_TK):
            raise ValueError(f"found {len(hidden_TH)} tokens and {len(index_TK)} decisions, expected as many")
        norm_TK = torch.zeros(index_TK.shape, device=hidden_TH.device)
        candidates = _candidate_weights(choice)
        totals = [torch.zeros(hidden_TH.shape, device=hidden_TH.device) for _ in candidates]
        for expert, module in enumerate(self.site.listed):
            tokens, slots = torch.where((index_TK == expert) & (choice.weights_TK != 0))
            if len(tokens):
                expert_output = module.forward(hidden_TH[tokens]).float()
                norm_TK[tokens, slots] = expert_output.norm(dim=1)
                for total, weights_TK in zip(totals, candidates, strict=True):
                    total.index_add_(0, tokens, expert_output * weights_TK[tokens, slots, None].float())
        layer_output = output[0] if isinstance(output, tuple) else output
        found = next(
            (w for w, total in zip(candidates, totals, strict=True) if _adds_up(total, layer_output)), None
        )
        if found is None:
            raise ValueError(_NOT_THE_SUM)
        return RouterOutput(index_TK, found, None), norm_TK


def _candidate_weights(choice: RouterOutput) -> list[Tensor]:
    """Return candidates for the [T, K] weights that scale the outputs.

    The candidates are the router's own weights and, for a gate that returns logits only, their softmax over
    all experts or over the chosen ones. The layer's output shows which of them the model uses.
    """
    if choice.logits_TE is None:
        return [choice.weights_TK]
    chosen = choice.index_TK.clamp(0, choice.logits_TE.shape[1] - 1)
    softmax_TK = choice.logits_TE.float().softmax(-1).gather(1, chosen)
    return [choice.weights_TK, softmax_TK, softmax_TK / softmax_TK.sum(-1, keepdim=True)]


_NOT_THE_SUM = (
    "the weighted outputs of the experts do not add up to the layer's output: it holds something else (a "
    "shared expert), or the weights are others than the router tells"
)


def _adds_up(total: Tensor, output: Tensor) -> bool:
    """Return whether the sum of weighted outputs equals the layer's output, up to rounding."""
    output = output.detach()
    difference = (total - output.reshape(total.shape).float()).norm()
    return bool(difference <= _TOLERANCE.get(output.dtype, _TOLERANCE_HALF) * output.float().norm())
