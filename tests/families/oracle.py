"""The truth about a routing, found by intervention on the weights.

For every call of a layer's experts: scale the weights of one expert, run the call again on the same input and
see which rows of the output move. Those are the tokens that this expert computed, whatever was declared.
"""

import dataclasses
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from .sites import Call, Capture, Site, expert_weights, find_sites

SCALE = 1.5
KNOWN_DEFECTS = {
    "NllbMoeExperts": "one_hot of a mask of 0 and 1: only experts 0 and 1 run, whatever the router chose",
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """What one call of one layer's experts really computed."""

    path: str
    """Of the experts module, or of the block that holds the experts."""
    router_path: str
    """Of the router beside it; of the block itself where it routes inside; empty where nothing routes."""
    call: int
    """0, 1, 2 … at this path."""
    tokens: int
    pairs: frozenset[tuple[int, int]]
    """(token, expert)."""
    experts: int
    """Real ones: identity experts have no weights to intervene on."""
    defect: str = ""
    """Why this truth is not what the router declares, where that is a fault of transformers."""

    @property
    def assignments(self) -> np.ndarray:
        """Tokens of each real expert, int64 [E]."""
        counts = np.zeros(self.experts, dtype=np.int64)
        for _, expert in self.pairs:
            counts[expert] += 1
        return counts

    @property
    def experts_per_token(self) -> np.ndarray:
        """Real experts of each token, int64 [T]."""
        counts = np.zeros(self.tokens, dtype=np.int64)
        for token, _ in self.pairs:
            counts[token] += 1
        return counts


class Intervention:
    """Watches a model for as long as it is open; ``truths()`` then runs the experts again.

    Take off any other hooks before ``truths()``: replaying a block may call modules inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = {site.path: site for site in find_sites(model)}
        self._capture = Capture({path: site.captured for path, site in self.sites.items()})

    def __enter__(self) -> "Intervention":
        self._capture.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._capture.__exit__(kind, error, where)

    @property
    def calls(self) -> list[Call]:
        """What the experts were given, in the order of the calls."""
        return self._capture.calls

    def truths(self) -> list[Truth]:
        """One for each call, in the order of the calls."""
        return [find_truth(self.sites[call.path], call) for call in self.calls]


@torch.no_grad()
def find_truth(site: Site, call: Call) -> Truth:
    """Which rows of a call each expert moves."""
    before = _replay(site, call)
    if not torch.isfinite(before).all():
        raise AssertionError(f"{call.path} gives values that are not finite: no row can be seen to move")
    weights = expert_weights(site.module)
    pairs: set[tuple[int, int]] = set()
    for expert, tensors in enumerate(weights):
        originals = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.mul_(SCALE)
        moved = (_replay(site, call) != before).any(dim=-1)
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)
        pairs.update((token, expert) for token in moved.nonzero().flatten().tolist())
    return Truth(
        path=call.path,
        router_path=site.router_path,
        call=call.number,
        tokens=before.shape[0],
        pairs=frozenset(pairs),
        experts=len(weights),
        defect=KNOWN_DEFECTS.get(site.kind, ""),
    )


def _replay(site: Site, call: Call) -> torch.Tensor:
    """The call's output, a row for each token. ``forward``, so that nobody's hooks fire on the module."""
    module: Any = site.module
    if site.kind == "JetMoeMoA":
        queries, *_ = module.map(call.args[0][None])
        return queries.reshape(queries.shape[1], -1)
    output = module.forward(*call.args, **call.kwargs)
    if site.kind == "DogeCDMoE":
        output = output[0]
    if site.kind == "Llama4TextExperts":
        # Rows are expert-major: row e * T + t is what expert e makes of token t.
        return output.view(site.real_experts, -1, output.shape[-1]).transpose(0, 1).flatten(1)
    return output.reshape(-1, output.shape[-1])
