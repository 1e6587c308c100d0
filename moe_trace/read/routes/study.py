"""`study`: every analysis of recorded routes at once, layer by layer.

Padding and recomputed tokens are left out of all figures but `LayerStudy.load`, which has every token of the
forward passes, as a report of the same run has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moe_trace.data.errors import UsageError
from moe_trace.data.load_stats import Load, describe_load
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes, concatenate
from moe_trace.read.routes.distinct import Distinct, distinct
from moe_trace.read.routes.expert_pairs import Coactivation, Pairs, Transition, coactivation, transition
from moe_trace.read.routes.gates import Gates, gates
from moe_trace.read.routes.locality import Locality, locality
from moe_trace.read.routes.saturation import Saturation, same_tokens, saturation
from moe_trace.read.routes.specialisation import Domains, IdOrder, Vocabulary, domains, vocabulary
from moe_trace.read.routes.tokens import LayerTokens, TokenOrder, layer_tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStudy:
    """What the routes through one layer say."""

    layer: str
    """Module path of the router."""
    num_experts: int
    top_k: int
    tokens: int
    """Tokens that count: no padding, not recomputed, the layer's call not lost."""
    skipped: int
    """Their slots without an expert."""
    counts: npt.NDArray[np.int64]
    """[E] their assignments."""
    load: Load
    """Of the assignments of all tokens, padding too, as `RouterSummary.load`."""
    coactivation: Coactivation
    distinct: Distinct
    locality: Locality | None
    """None where sequences and positions are unknown."""
    transition: Transition | None
    """To the next layer; None for the last."""
    gates: Gates | None
    """None where weights were not recorded."""
    domains: Domains | None
    """None for a single file, and for files of the same tokens."""
    vocabulary: dict[str, Vocabulary] = field(default_factory=dict)
    """By `input`, `target` and `predicted`: those whose ids were recorded or given."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutesStudy:
    """What recorded routes say, of one group of layers."""

    labels: tuple[str, ...]
    """The files."""
    rows: int
    """Rows of the studied files."""
    padding: int
    """Rows left out as padding."""
    recomputed: int
    """Rows left out as run again by a backward pass."""
    unknown: int
    """Rows that count, but whose sequence or position is unknown; `Locality` leaves them out."""
    runs: int
    """Chains of tokens that follow each other in a sequence."""
    pairs: Pairs
    layers: tuple[LayerStudy, ...]
    saturation: Saturation | None
    """Where the files hold the same tokens; all else is then of the last one."""
    others: tuple[RoutesStudy, ...] = ()
    """Groups of layers that saw other tokens."""


def study(
    parts: Sequence[RecordedRoutes],
    labels: Sequence[str] | None = None,
    *,
    pairs: Pairs = "all",
    predicted: Sequence[np.ndarray] | None = None,
) -> RoutesStudy:
    """Study one file, several files of one model (domains), or several of the same tokens (checkpoints).

    Args:
        parts: routes through the same layers.
        labels: a name for each; by default `0`, `1`, ...
        pairs: which pairs co-activation counts.
        predicted: [T] the token ids that the model predicted at each row, for every part; negative: unknown.

    Raises:
        UsageError: no parts, other layers, labels or predictions that do not match the parts.
    """
    names = _checked(parts, labels, predicted)
    groups = [
        _group([part.groups[number] for part in parts], names, pairs, predicted if number == 0 else None)
        for number in range(min(len(part.groups) for part in parts))
    ]
    return replace(groups[0], others=tuple(groups[1:]))


def _checked(
    parts: Sequence[RecordedRoutes], labels: Sequence[str] | None, predicted: Sequence[np.ndarray] | None
) -> tuple[str, ...]:
    if not parts:
        raise UsageError("expected at least one file of routes; found none")
    names = tuple(labels) if labels is not None else tuple(map(str, range(len(parts))))
    if len(names) != len(parts):
        raise UsageError(f"expected a label for each of {len(parts)} files; found {len(names)}")
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if (part.layers, part.num_experts, part.top_k) != (first.layers, first.num_experts, first.top_k):
            raise UsageError(f"{name} has other layers, experts or top k than {names[0]}; study them apart")
        if max(part.num_experts, default=0) > part.no_expert:
            raise UsageError(
                f"{name}: {part.expert_ids.dtype} ids cannot tell {max(part.num_experts)} experts"
            )
    if predicted is not None and [len(ids) for ids in predicted] != [len(part) for part in parts]:
        raise UsageError("expected one predicted token id for each row of each file; found other numbers")
    return names


def _group(
    parts: Sequence[RecordedRoutes],
    names: tuple[str, ...],
    pairs: Pairs,
    predicted: Sequence[np.ndarray] | None,
) -> RoutesStudy:
    """Of one group of layers."""
    aligned = same_tokens(parts)
    chosen = parts[-1:] if aligned else parts
    routes = chosen[0] if len(chosen) == 1 else concatenate([_apart(p, i) for i, p in enumerate(chosen)])
    order = TokenOrder.of(routes)
    guessed = np.concatenate(predicted[-len(chosen) :]) if predicted is not None else None
    file_of = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
    layers = _Layers(routes, order, pairs, len(chosen), file_of, _named_ids(routes, order, guessed))
    return RoutesStudy(
        labels=names,
        rows=len(routes),
        padding=int(routes.padding.sum()),
        recomputed=int((routes.again & ~routes.padding).sum()),
        unknown=int((~order.known).sum()),
        runs=int((order.known & ~order.follows).sum()),
        pairs=pairs,
        layers=layers.studied(),
        saturation=saturation(parts, names, order.rows) if aligned else None,
    )


_PER_FILE = 1 << 40


def _apart(part: RecordedRoutes, number: int) -> RecordedRoutes:
    """With numbers of sequences and forwards that no other file has."""
    sequence = np.where(part.sequence >= 0, part.sequence + np.int64(number * _PER_FILE), UNKNOWN)
    return replace(part, sequence=sequence, forward=part.forward + np.int64(number * _PER_FILE), others=())


def _named_ids(routes: RecordedRoutes, order: TokenOrder, predicted: np.ndarray | None) -> dict[str, IdOrder]:
    """Kinds of token ids -> the tokens by id."""
    named = {}
    if routes.token_ids is not None:
        ids = routes.token_ids[order.rows]
        after = np.append(np.where(order.follows[1:], ids[1:], UNKNOWN), UNKNOWN)[: len(ids)]
        named = {"input": IdOrder.of(ids), "target": IdOrder.of(after)}
    if predicted is not None:
        named["predicted"] = IdOrder.of(predicted[order.rows])
    return named


@dataclass(frozen=True)
class _Layers:
    """What the analyses of every layer share."""

    routes: RecordedRoutes
    order: TokenOrder
    pairs: Pairs
    files: int
    file_of: npt.NDArray[np.int64]
    ids: dict[str, IdOrder]

    def studied(self) -> tuple[LayerStudy, ...]:
        """All layers, two at a time: numpy lets another thread run while it works on an array."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            return tuple(pool.map(self._one, range(len(self.routes.layers))))

    def _one(self, layer: int) -> LayerStudy:
        routes, last = self.routes, layer + 1 == len(self.routes.layers)
        here = layer_tokens(routes, self.order, layer)
        files_N = self.file_of[here.order.rows]
        return LayerStudy(
            layer=routes.layers[layer],
            num_experts=here.experts,
            top_k=routes.top_k[layer],
            tokens=len(here),
            skipped=here.ids.size - here.assignments,
            counts=here.counts,
            load=describe_load(self._forward_counts(layer, here)),
            coactivation=coactivation(here, self.pairs),
            distinct=distinct(routes, here),
            locality=locality(here),
            transition=None if last else transition(here, layer_tokens(routes, self.order, layer + 1)),
            gates=gates(routes, layer, here),
            domains=domains(here, files_N, self.files) if self.files > 1 else None,
            vocabulary=self._vocabulary(here),
        )

    def _forward_counts(self, layer: int, here: LayerTokens) -> npt.NDArray[np.int64]:
        """[E] assignments of all tokens of the forward passes: those that count, and padding."""
        ids_TK = self.routes.expert_ids[self.routes.padding & ~self.routes.again, layer]
        added = np.bincount(ids_TK.ravel(), minlength=self.routes.no_expert + 1)
        return here.counts + added[: here.experts]

    def _vocabulary(self, here: LayerTokens) -> dict[str, Vocabulary]:
        whole = len(here) == len(self.order.rows)
        kept = None if whole or not self.ids else np.isin(self.order.rows, here.order.rows)
        found = {
            kind: vocabulary(here, order if kept is None else order.only(kept))
            for kind, order in self.ids.items()
        }
        return {kind: one for kind, one in found.items() if one is not None}
