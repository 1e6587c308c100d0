"""One step of a run, by mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_trace.workload.config import Mode

Step = Callable[[], None]


def make_step(model: Any, inputs: dict[str, Tensor], *, mode: Mode, max_new_tokens: int) -> Step:
    """A function that runs one step of `mode` on the inputs."""
    if mode == "train":
        return _training_step(model.train(), inputs)
    model.eval()
    if mode == "generate":
        return _generating_step(model, inputs, max_new_tokens)
    return _prefill_step(model, inputs)


def _prefill_step(model: Any, inputs: dict[str, Tensor]) -> Step:
    @torch.no_grad()
    def step() -> None:
        model(**inputs)

    return step


def _generating_step(model: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> Step:
    @torch.no_grad()
    def step() -> None:
        # Exactly this many tokens, so that steps are alike.
        model.generate(
            **inputs, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False
        )

    return step


def _training_step(model: Any, inputs: dict[str, Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
