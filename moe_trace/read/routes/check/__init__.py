"""Check whether captured routes can be a router's decisions, with rules that report their violations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes
from moe_trace.read.routes.check.layers import equal_layers, fixed_layers, moved_layers
from moe_trace.read.routes.check.repeats import repeated_rows, uniform_rows


@dataclass(frozen=True, kw_only=True)
class RoutesProblem:
    """A violated rule: number of tokens, total, and first occurrence."""

    rule: str
    layer: str
    """Module path, or empty for all layers together."""
    count: int
    """Number of tokens that violate the rule."""
    of: int
    first: str
    """Description of the first of them."""
    message: str

    @property
    def sentence(self) -> str:
        """The whole problem in one line."""
        if not self.of:
            return self.message
        where = f"{self.layer}: " if self.layer else ""
        return f"{where}{self.count:,} of {self.of:,} tokens, first {self.first}: {self.message}"

    @classmethod
    def of_file(cls, message: str) -> RoutesProblem:
        """Create the problem of a file that could not be read."""
        return cls(rule="file_can_be_read", layer="", count=0, of=0, first="", message=message)


Found = Iterable[tuple[int | None, np.ndarray, str]]
"""(layer, rows, message)"""


def ids_are_in_range(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """Each id is one of the layer's experts, or means no expert."""
    for layer, experts in enumerate(routes.num_experts):
        ids_TK = routes.expert_ids[:, layer]
        invalid = ((ids_TK >= experts) & (ids_TK != routes.no_expert)).any(1)
        yield layer, np.flatnonzero(invalid), f"an id that is none of the layer's {experts} experts"


def slots_are_within_top_k(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """Slots beyond the layer's top-k are empty."""
    for layer, slots in enumerate(routes.top_k):
        beyond = (routes.expert_ids[:, layer, slots:] != routes.no_expert).any(1)
        yield layer, np.flatnonzero(beyond), f"an id in a slot beyond the layer's top-{slots}"


def experts_of_a_token_differ(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """No expert occurs twice in one row of a layer."""
    for layer in range(len(routes.layers)):
        if layer in fixed:
            continue
        ids_TK = np.sort(routes.expert_ids[:, layer], axis=1)
        repeated = ((ids_TK[:, 1:] == ids_TK[:, :-1]) & (ids_TK[:, 1:] != routes.no_expert)).any(1)
        yield layer, np.flatnonzero(repeated), "an expert twice in one token"


def layers_route(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """No layer has the same ids in all its rows, like the zeros of a dense layer."""
    for layer in sorted(fixed):
        rows = np.flatnonzero(_used(routes)[:, layer])
        ids = routes.expert_ids[rows[0], layer].tolist()
        yield layer, rows, f"{ids} in every token: a dense layer, a fill, or a router that has collapsed"


def layers_are_their_own(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """No layer has another layer's rows."""
    for layer, other, rows in equal_layers(routes.expert_ids, _used(routes), fixed):
        yield layer, rows, f"the ids of {routes.layers[other]}, in the same order"


def rows_are_their_own(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """No token's row equals that of the token before it, beyond chance."""
    rows = repeated_rows(routes, _used(routes), fixed)
    reason = (
        "of another token"
        if routes.token_ids is not None
        else "stale, or of one token fed over and over; token ids would tell"
    )
    yield None, rows, f"the ids of the token before it in every layer and slot: {reason}"


def padding_is_marked(routes: RecordedRoutes, fixed: frozenset[int]) -> Found:
    """No row has the same ids in all layers, and padding of an imported capture has no experts."""
    yield (
        None,
        uniform_rows(routes, _used(routes), fixed),
        "the same ids in every layer: a fill, not a routing",
    )
    if "captured_by" in routes.model:
        has_experts = routes.padding & (routes.expert_ids != routes.no_expert).any((1, 2))
        yield None, np.flatnonzero(has_experts), "ids of real experts in a token that is padding"


RULES: dict[str, Callable[[RecordedRoutes, frozenset[int]], Found]] = {
    rule.__name__: rule
    for rule in (
        ids_are_in_range,
        slots_are_within_top_k,
        experts_of_a_token_differ,
        layers_route,
        layers_are_their_own,
        rows_are_their_own,
        padding_is_marked,
    )
}


def check_routes(
    routes: RecordedRoutes, reference: RecordedRoutes | None = None
) -> dict[str, list[RoutesProblem]]:
    """Check all groups of layers against all rules; a rule that holds has an empty list.

    Args:
        reference: Routes of the same tokens, for the rule `layers_stand_in_their_place`.

    Raises:
        UsageError: The reference has other tokens.
    """
    found: dict[str, list[RoutesProblem]] = {rule: [] for rule in RULES}
    for group in routes.groups:
        fixed = fixed_layers(group.expert_ids, _used(group))
        for name, rule in RULES.items():
            for layer, rows, message in rule(group, fixed):
                if len(rows):
                    found[name].append(_problem(name, group, layer, rows, message))
    if reference is not None:
        name = "layers_stand_in_their_place"
        moved = moved_layers(routes, reference)
        found[name] = [_problem(name, routes, layer, rows, message) for layer, rows, message in moved]
    return found


def _problem(
    rule: str, routes: RecordedRoutes, layer: int | None, rows: np.ndarray, message: str
) -> RoutesProblem:
    return RoutesProblem(
        rule=rule,
        layer="" if layer is None else routes.layers[layer],
        count=len(rows),
        of=len(routes),
        first=place(routes, int(rows[0])),
        message=message,
    )


def place(routes: RecordedRoutes, row: int) -> str:
    """Describe a row by its number and what is known of its token."""
    words = [f"row {row}", f"step {routes.step[row]}"]
    for name in ("sequence", "position"):
        value = int(getattr(routes, name)[row])
        if value != UNKNOWN:
            words.append(f"{name} {value}")
    return ", ".join(words)


def _used(routes: RecordedRoutes) -> np.ndarray:
    """Return which rows are not padding and contain an expert, bool [T, L]."""
    held: np.ndarray = (routes.expert_ids != routes.no_expert).any(2)
    return held & ~routes.padding[:, None]
