"""The routes recorded with a trace: pages of tokens and figures of their study, in bounded answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from moe_trace.data.errors import MoETraceError, TraceFileError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.reader import read_routes, routes_beside
from moe_trace.read.routes.study import study
from moe_trace.read.routes.text.tokenizer import TOKENIZER, read_vocabulary
from moe_trace.show.figures.routes.curves import domain_bars, saturation_curve
from moe_trace.show.figures.routes.report import routes_figures
from moe_trace.show.routes.tokens import TokenPages
from moe_trace.show.routes_page import notes
from moe_trace.show.tensorboard.catalog import TRACE_NAME, Trace, is_below
from moe_trace.show.tensorboard.parameters import Parameters, integer
from moe_trace.show.tensorboard.to_json import JsonDict, plain_figure

KEPT_MAX = 2
COMPARED_MAX = 12
"""Maximum number of files of a run that are compared."""
STUDIED_MAX_SLOTS = 32_000_000
"""Maximum number of slots that are studied per file, which takes some seconds."""


def routes_file(trace: Trace) -> Path | None:
    """Return the file of routes next to a trace, if there is one in the log folder."""
    match = TRACE_NAME.match(trace.path.name)  # also matches a reduced file
    path = routes_beside(trace.path.with_name(match[0])) if match else None
    return path if path is not None and is_below(path, trace.root) else None


@dataclass
class _Kept:
    routes: RecordedRoutes
    pages: list[TokenPages]
    computing: threading.Lock = field(default_factory=threading.Lock)
    figures: dict[Hashable, JsonDict] = field(default_factory=dict)


class RoutesFiles:
    """Handler of the view's requests; keeps the files requested last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_once = lru_cache(KEPT_MAX)(_read)

    def header(self, trace: Trace, parameters: Parameters) -> JsonDict:
        """Return the data shared by all pages of a group of layers; `{"missing": True}` without a file."""
        kept = self._read(trace)
        if kept is None:
            return {"missing": True}
        vocabulary = next((pages.vocabulary for pages in kept.pages), None)
        groups = [", ".join(group.layers[:1]) + f" … ({len(group.layers)})" for group in kept.routes.groups]
        return {
            "header": self._group(kept, parameters).header(),
            "notes": notes(kept.routes, vocabulary, how=f"the environment variable {TOKENIZER}"),
            "groups": groups,
        }

    def page(self, trace: Trace, parameters: Parameters) -> JsonDict:
        """Return one page of tokens.

        Raises:
            KeyError: there is no such page or group.
        """
        kept = self._read(trace)
        if kept is None:
            return {"missing": True}
        return self._group(kept, parameters).page(integer(parameters, "page", 0))

    def study(self, trace: Trace, run: Sequence[Trace], parameters: Parameters) -> JsonDict:
        """Return figures of one group of layers, and of its comparison with the other files of its run.

        Args:
            run: all traces of the run.
        """
        kept = self._read(trace)
        if kept is None:
            return {"missing": True}
        group = integer(parameters, "group", 0)
        routes = self._group(kept, parameters).routes
        others = [trace for trace in run if routes_file(trace) is not None][:COMPARED_MAX]
        key = (group, *(trace.key for trace in others))
        with kept.computing:
            if key not in kept.figures:
                kept.figures = {
                    key: _study_json(routes, trace.label) | {"compared": _compared(routes, others, group)}
                }
            return kept.figures[key]

    def _group(self, kept: _Kept, parameters: Parameters) -> TokenPages:
        group = integer(parameters, "group", 0)
        if not 0 <= group < len(kept.pages):
            raise KeyError("group of layers of that number")
        return kept.pages[group]

    def _read(self, trace: Trace) -> _Kept | None:
        path = routes_file(trace)
        if path is None:
            return None
        status = path.stat()
        with self._lock:  # one thread reads a file, the others wait for it
            return self._read_once(path, status.st_mtime_ns, status.st_size)


def _read(path: Path, *version: int) -> _Kept:
    """Read the file; `version` only serves as a cache key for its current content."""
    try:
        routes = read_routes(path)
    except MemoryError as error:
        raise TraceFileError(f"{path.name}: too large for the memory that this machine has left") from error
    tokenizer_path = os.environ.get(TOKENIZER) if routes.token_ids is not None else None
    vocabulary = read_vocabulary(tokenizer_path) if tokenizer_path else None
    return _Kept(routes, [TokenPages(group, vocabulary) for group in routes.groups])


def _study_json(routes: RecordedRoutes, label: str) -> JsonDict:
    """Study as many of the first tokens as an interactive request allows."""
    per_token = max(1, routes.expert_ids[:1].size)
    max_tokens = max(1, STUDIED_MAX_SLOTS // per_token)
    part = routes[:max_tokens] if len(routes) > max_tokens else routes
    figures = [plain_figure(figure) for figure in routes_figures([part], [label])]
    note = (
        f"Studied are the first {max_tokens:,} of {len(routes):,} tokens." if len(routes) > max_tokens else ""
    )
    return {"figures": figures, "note": note}


def _compared(routes: RecordedRoutes, others: Sequence[Trace], group: int) -> list[JsonDict]:
    """Compare files of the same rank and layers, as checkpoints or as domains."""
    parts, labels = [], []
    max_tokens = max(1, STUDIED_MAX_SLOTS // max(1, routes.expert_ids[:1].size * len(others)))
    for other in others:
        path = routes_file(other)
        with suppress(
            MoETraceError, IndexError, OSError
        ):  # an unreadable file is reported when it is selected
            part = read_routes(path).groups[group] if path is not None else routes
            same = (part.layers, part.num_experts, part.top_k, part.rank)
            if same == (routes.layers, routes.num_experts, routes.top_k, routes.rank):
                parts.append(part[:max_tokens])
                labels.append(other.label)
    if len(parts) < 2:
        return []
    found = study(parts, labels)
    return [plain_figure(figure) for figure in (domain_bars(found), saturation_curve(found)) if figure]
