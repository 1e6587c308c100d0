"""Routers that a forward did not reach although earlier ones did: replaced meanwhile, or fused away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

from torch import nn

from moe_trace.find.routers import RouterSite


class MissingSites:
    """Counter, per router, of forwards that ran none of its hooks.

    A part of the model that runs as a whole or not at all, such as an encoder next to a decoder, counts as
    missed only if its routers are no longer those of the model.
    """

    def __init__(self, model: nn.Module, sites: Sequence[RouterSite]) -> None:
        self.forwards: Counter[str] = Counter()
        self._model = model
        self._sites = sites
        self._expected: set[int] = set()
        self._last_complete: Collection[int] | None = None
        """The expected sites, as the object that the last complete forward reported."""
        self._towers = [re.split(r"\.\d+\.", f".{site.name}")[0] for site in sites]

    def look(self, parts: Sequence[Collection[int]]) -> None:
        """Compare the sites that a recorded forward reached with the expected ones."""
        if len(parts) == 1 and parts[0] is self._last_complete:
            return
        reached = set(chain.from_iterable(parts))
        if reached == self._expected:
            self._last_complete = parts[0] if len(parts) == 1 else None
            return
        self._last_complete = None
        missing = self._expected - reached
        towers = {self._towers[index] for index in reached}
        for index in missing:
            if not reached or self._towers[index] in towers or not self._is_in_place(index):
                self.forwards[self._sites[index].name] += 1
        self._expected |= reached

    def _is_in_place(self, index: int) -> bool:
        site = self._sites[index]
        try:
            return self._model.get_submodule(site.name) is site.router
        except AttributeError:
            return False
