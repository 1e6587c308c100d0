"""Routes as pages of tokens in reading order, with columns packed as bytes, for the HTML page and the tab."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.layer_labels import layer_labels
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes
from moe_trace.read.routes.text.texts import Text, find_texts
from moe_trace.read.routes.text.tokenizer import Vocabulary

JsonDict = dict[str, Any]

TOKENS_MAX = 2048
"""Maximum number of tokens per page; more elements make a browser slow."""
PAGE_MAX_BYTES = 2**20
PADDING, RECOMPUTED = 1, 2
"""Bits of the column `flags`."""
_PAGES_NAMED_MAX = 20_000


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Tokens of one text on one page."""

    text: Text
    offset: int
    """Number of tokens of the text on previous pages."""
    tokens: int

    def words(self) -> str:
        if self.tokens == self.text.tokens:
            return self.text.label
        last = self.offset + self.tokens
        return f"{self.text.label}, tokens {self.offset + 1:,} to {last:,} of {self.text.tokens:,}"


class TokenPages:
    """The tokens of one group of layers, one page at a time.

    Args:
        routes: routes of one group; see `RecordedRoutes.groups`.
        vocabulary: mapping from token ids to text, used where ids were recorded.
    """

    def __init__(self, routes: RecordedRoutes, vocabulary: Vocabulary | None = None) -> None:
        self.routes = routes
        self.vocabulary = vocabulary if routes.token_ids is not None else None
        found = find_texts(routes)
        self._rows = found.rows
        per_token = sum(column[:1].nbytes for column in routes.columns().values())
        self._pages = list(_pages(found.texts, max(1, min(TOKENS_MAX, PAGE_MAX_BYTES // max(1, per_token)))))

    def __len__(self) -> int:
        return len(self._pages)

    def header(self) -> JsonDict:
        """Return the data that all pages share."""
        routes = self.routes
        counted = routes.counted
        counts_LE = (routes if counted.all() else routes[counted]).assignments()
        return {
            "layers": [label for label, _ in layer_labels(routes.layers)],
            "paths": list(routes.layers),
            "num_experts": list(routes.num_experts),
            "top_k": list(routes.top_k),
            "no_expert": routes.no_expert,
            "tokens": len(routes),
            "padding": int(routes.padding.sum()),
            "assignments": [
                row[:experts].tolist() for row, experts in zip(counts_LE, routes.num_experts, strict=True)
            ],
            "stages": list(STAGES),
            "has_text": self.vocabulary is not None,
            "pages": [_title(parts) for parts in self._pages[:_PAGES_NAMED_MAX]],
        }

    def page(self, index: int) -> JsonDict:
        """Return the tokens of a page.

        Raises:
            KeyError: there is no such page.
        """
        if not 0 <= index < len(self._pages):
            raise KeyError("page of that number")
        parts = self._pages[index]
        first = parts[0].text.first + parts[0].offset
        rows = self._rows[first : first + sum(part.tokens for part in parts)]
        chosen = self.routes[rows]
        columns = _columns(chosen)
        texts = {}
        if self.vocabulary is not None and chosen.token_ids is not None:
            texts = self.vocabulary.texts(chosen.token_ids.tolist())
        return {
            "tokens": len(rows),
            "texts": [[part.words(), part.tokens] for part in parts],
            "columns": [[name, column.dtype.name, column.size] for name, column in columns.items()],
            "data": packed(columns.values()),
            "words": {str(token_id): text for token_id, text in texts.items()},
        }


def _pages(texts: Sequence[Text], most: int) -> Iterator[list[_Part]]:
    """Yield pages: short texts share one, long ones take several."""
    page: list[_Part] = []
    remaining = most
    for text in texts:
        offset = 0
        while offset < text.tokens:
            if page and text.tokens - offset > remaining:
                yield page
                page, remaining = [], most
            part = _Part(text=text, offset=offset, tokens=min(remaining, text.tokens - offset))
            page.append(part)
            offset += part.tokens
            remaining -= part.tokens
    if page:
        yield page


def _title(parts: Sequence[_Part]) -> str:
    more = len(parts) - 1
    return parts[0].words() + (f", and {more} more {'text' if more == 1 else 'texts'}" if more else "")


def _columns(chosen: RecordedRoutes) -> dict[str, np.ndarray]:
    """Return the columns by descending item size, so that each offset is a multiple of the item size."""
    flags = chosen.padding * np.uint8(PADDING) | chosen.again * np.uint8(RECOMPUTED)
    found: dict[str, np.ndarray | None] = {
        "position": chosen.position.astype(np.int32),
        "step": chosen.step.clip(UNKNOWN, 2**31 - 1).astype(np.int32),
        "token_ids": chosen.token_ids,
        "weights": None if chosen.weights is None else chosen.weights.view(np.uint16),
        "expert_ids": chosen.expert_ids,
        "flags": flags.astype(np.uint8),
        "stage_codes": chosen.stage_codes,
        "lost": None if chosen.lost_layers is None else chosen.lost_layers.view(np.uint8),
    }
    known = {name: column for name, column in found.items() if column is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1].itemsize))


def packed(columns: Any) -> str:
    """Return the concatenated columns, little-endian, as gzip in base64."""
    content = b"".join(
        np.ascontiguousarray(column).astype(column.dtype.newbyteorder("<"), copy=False).tobytes()
        for column in columns
    )
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")
