"""Group routes by text: a sequence from its prefill to its last decoded token.

Rows are recorded in the order of the calls, a batch of sequences at a time; here they are sorted in reading
order. Array names end in their shape: T tokens, R runs (the rows of one sequence in one forward).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes

_NO_POSITION = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class Text:
    """One sequence, or the tokens of a forward with unknown sequences."""

    label: str
    first: int
    """Index of its first token in `Texts.rows`."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Texts:
    """All texts of a group of layers."""

    rows: np.ndarray
    """[T] int64: rows of the routes, text by text."""
    texts: tuple[Text, ...]


def find_texts(routes: RecordedRoutes) -> Texts:
    """Find the texts, in the order in which they began.

    A run continues the text of its sequence if its first position is at most one beyond the last one:
    decoding, chunked prefill, and tokens that speculation ran twice. A run from position 0 begins another.
    """
    if not len(routes):
        return Texts(rows=np.empty(0, np.int64), texts=())
    again_T = routes.again
    by_sequence_T = np.lexsort((again_T, routes.sequence))  # stable: keeps the order of the calls
    keys = [column[by_sequence_T] for column in (routes.forward, routes.sequence, again_T)]
    starts_T = np.ones(len(routes), bool)
    starts_T[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    first_R = np.flatnonzero(starts_T)
    text_R = np.cumsum(_begins_text(routes, by_sequence_T, first_R)) - 1
    began_at = np.full(text_R[-1] + 1, _NO_POSITION)
    np.minimum.at(began_at, text_R, by_sequence_T[first_R])
    size_R = np.diff(first_R, append=len(routes))
    text_T = np.repeat(text_R, size_R)
    rows_T = by_sequence_T[np.argsort(began_at[text_T], kind="stable")]
    sizes = np.bincount(text_T)[np.argsort(began_at, kind="stable")]
    ends = np.cumsum(sizes)
    texts = (
        Text(label=_label(routes, rows_T[end - size : end]), first=int(end - size), tokens=int(size))
        for size, end in zip(sizes, ends, strict=True)
    )
    return Texts(rows=rows_T, texts=tuple(texts))


def _begins_text(routes: RecordedRoutes, rows_T: np.ndarray, first_R: np.ndarray) -> np.ndarray:
    """Return whether a run does not continue the previous run, bool [R]."""
    position_T = routes.position[rows_T].astype(np.int64)
    unknown_T = routes.padding[rows_T] | (position_T < 0)
    lowest_R = np.minimum.reduceat(np.where(unknown_T, _NO_POSITION, position_T), first_R)
    highest_R = np.maximum.reduceat(np.where(unknown_T, UNKNOWN, position_T), first_R)
    sequence_R = routes.sequence[rows_T[first_R]]
    again_R = routes.again[rows_T[first_R]]
    begins_R = np.ones(len(first_R), bool)
    begins_R[1:] = (
        (sequence_R[1:] != sequence_R[:-1])
        | (sequence_R[1:] == UNKNOWN)
        | (again_R[1:] != again_R[:-1])
        | (lowest_R[1:] == 0)
        | (lowest_R[1:] > highest_R[:-1] + 1)
    )
    return begins_R


def _label(routes: RecordedRoutes, rows: np.ndarray) -> str:
    first, last = rows[0], rows[-1]
    steps = sorted({int(routes.step[first]), int(routes.step[last])})
    parts = [f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[1]}"]
    if routes.sequence[first] == UNKNOWN:
        parts.append(f"forward {routes.forward[first]}, sequence unknown")
    else:
        parts.append(f"sequence {routes.sequence[first]}")
    stages = dict.fromkeys(STAGES[code] for code in (routes.stage_codes[first], routes.stage_codes[last]))
    parts.append(" and ".join(stages))
    if routes.again[first]:
        parts.append("recomputed")
    return ", ".join(parts)
