"""`study`: all analyses of recorded routes, layer by layer.

Padding and recomputed tokens are excluded from all metrics but `LayerStudy.load`, which includes every token
of the forward passes, as in a report of the same run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.data.load_stats import Load, describe_load
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes, concatenate
from moe_trace.read.routes.distinct import Distinct, distinct
from moe_trace.read.routes.expert_pairs import Coactivation, Pairs, Transition, coactivation, transition
from moe_trace.read.routes.gates import Gates, gates
from moe_trace.read.routes.locality import Locality, locality
from moe_trace.read.routes.saturation import Saturation, same_tokens, saturation
from moe_trace.read.routes.sets import Ints
from moe_trace.read.routes.specialisation import Domains, IdOrder, Vocabulary, domains, vocabulary
from moe_trace.read.routes.tokens import TokenOrder, layer_tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStudy:
    """Analysis of the routes through one layer."""

    layer: str
    """Module path of the router."""
    num_experts: int
    top_k: int
    tokens: int
    """Number of tokens that count: no padding, not recomputed, the layer's call not lost."""
    skipped: int
    """Number of their slots without an expert."""
    counts: Ints
    """[E] assignments of these tokens."""
    load: Load
    """Load from the assignments of all tokens including padding, as in `RouterSummary.load`."""
    coactivation: Coactivation
    distinct: Distinct
    locality: Locality | None
    """None if sequences and positions are unknown."""
    transition: Transition | None
    """Transition to the next layer; None for the last."""
    gates: Gates | None
    """None if weights were not recorded."""
    domains: Domains | None
    """None for a single file, and for files of the same tokens."""
    vocabulary: dict[str, Vocabulary] = field(default_factory=dict)
    """Specialisation by kind of ids, `input`, `target` and `predicted`, as far as recorded or given."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutesStudy:
    """Analysis of the recorded routes of one group of layers."""

    labels: tuple[str, ...]
    """Names of the files."""
    rows: int
    """Number of rows in the studied files."""
    padding: int
    """Number of rows excluded as padding."""
    recomputed: int
    """Number of rows excluded because a backward pass recomputed them."""
    unknown: int
    """Number of included rows with unknown sequence or position, which `Locality` excludes."""
    runs: int
    """Number of chains of consecutive tokens of a sequence."""
    pairs: Pairs
    layers: tuple[LayerStudy, ...]
    saturation: Saturation | None
    """Given if the files hold the same tokens; everything else is then about the last file."""
    others: tuple[RoutesStudy, ...] = ()
    """Studies of groups of layers that saw other tokens."""


def study(
    parts: Sequence[RecordedRoutes],
    labels: Sequence[str] | None = None,
    *,
    pairs: Pairs = "all",
    predicted: Sequence[np.ndarray] | None = None,
) -> RoutesStudy:
    """Study one file, several files of one model (domains), or several of the same tokens (checkpoints).

    Args:
        parts: Routes through the same layers.
        labels: A name for each part; by default `0`, `1`, ...
        pairs: Pairs that co-activation counts.
        predicted: Token ids that the model predicted at each row, [T], for every part; negative if unknown.

    Raises:
        UsageError: There are no parts, their layers differ, or labels or predictions do not match them.
    """
    names = _checked_labels(parts, labels, predicted)
    groups = [
        _group([part.groups[number] for part in parts], names, pairs, predicted if number == 0 else None)
        for number in range(min(len(part.groups) for part in parts))
    ]
    return replace(groups[0], others=tuple(groups[1:]))


def _checked_labels(
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
    aligned = same_tokens(parts)
    chosen = parts[-1:] if aligned else parts
    routes = (
        chosen[0]
        if len(chosen) == 1
        else concatenate([_with_unique_numbers(p, i) for i, p in enumerate(chosen)])
    )
    order = TokenOrder.of(routes)
    guessed = np.concatenate(predicted[-len(chosen) :]) if predicted is not None else None
    file_of = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
    ids = _named_ids(routes, order, guessed)
    shared: dict[str, Any] = {"routes": routes, "order": order, "pairs": pairs, "files": len(chosen)}
    study_layer = partial(_layer, **shared, file_of=file_of, ids=ids)
    with ThreadPoolExecutor(max_workers=2) as pool:  # numpy releases the GIL while it computes
        layers = tuple(pool.map(study_layer, range(len(routes.layers))))
    return RoutesStudy(
        labels=names,
        rows=len(routes),
        padding=int(routes.padding.sum()),
        recomputed=int((routes.again & ~routes.padding).sum()),
        unknown=int((~order.known).sum()),
        runs=int((order.known & ~order.follows).sum()),
        pairs=pairs,
        layers=layers,
        saturation=saturation(parts, names, order.rows) if aligned else None,
    )


_NUMBERS_PER_FILE = 1 << 40


def _with_unique_numbers(part: RecordedRoutes, number: int) -> RecordedRoutes:
    """Make the numbers of sequences and forwards unique across files."""
    sequence = np.where(part.sequence >= 0, part.sequence + np.int64(number * _NUMBERS_PER_FILE), UNKNOWN)
    return replace(
        part, sequence=sequence, forward=part.forward + np.int64(number * _NUMBERS_PER_FILE), others=()
    )


def _named_ids(routes: RecordedRoutes, order: TokenOrder, predicted: np.ndarray | None) -> dict[str, IdOrder]:
    """Return the tokens sorted by id, for each kind of token ids."""
    orders = {}
    if routes.token_ids is not None:
        ids = routes.token_ids[order.rows]
        after = np.append(np.where(order.follows[1:], ids[1:], UNKNOWN), UNKNOWN)[: len(ids)]
        orders = {"input": IdOrder.of(ids), "target": IdOrder.of(after)}
    if predicted is not None:
        orders["predicted"] = IdOrder.of(predicted[order.rows])
    return orders


def _layer(
    layer: int,
    routes: RecordedRoutes,
    order: TokenOrder,
    pairs: Pairs,
    files: int,
    file_of: Ints,
    ids: Mapping[str, IdOrder],
) -> LayerStudy:
    last = layer + 1 == len(routes.layers)
    choices = layer_tokens(routes, order, layer)
    kept_N = np.isin(order.rows, choices.order.rows) if ids and len(choices) < len(order.rows) else None
    vocabularies = {
        kind: vocabulary(choices, id_order if kept_N is None else id_order.only(kept_N))
        for kind, id_order in ids.items()
    }
    left_out = routes.expert_ids[routes.padding & ~routes.again, layer]
    padding_E = np.bincount(left_out.ravel(), minlength=routes.no_expert + 1)[: choices.experts]
    return LayerStudy(
        layer=routes.layers[layer],
        num_experts=choices.experts,
        top_k=routes.top_k[layer],
        tokens=len(choices),
        skipped=choices.ids.size - choices.assignments,
        counts=choices.counts,
        load=describe_load(choices.counts + padding_E),
        coactivation=coactivation(choices, pairs),
        distinct=distinct(routes, choices),
        locality=locality(choices),
        transition=None if last else transition(choices, layer_tokens(routes, order, layer + 1)),
        gates=gates(routes, layer, choices),
        domains=domains(choices, file_of[choices.order.rows], files) if files > 1 else None,
        vocabulary={kind: id_order for kind, id_order in vocabularies.items() if id_order is not None},
    )
