"""Token batches for a run, from prompts if there is a tokenizer, else random ids; and steps on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.data.errors import UsageError
from moe_trace.workload.config import Mode

_RANDOM_LENGTH = 128
Step = Callable[[], object]


def read_prompts(path: Path) -> dict[str, str]:
    """Read name -> text from a JSON object or list of strings, or a text file with one prompt per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as prompts ({error})") from error
    if path.suffix != ".json":
        lines = [line for line in text.splitlines() if line.strip()]
        prompts = {f"line {i + 1}": line for i, line in enumerate(lines)}
    else:
        prompts = _json_prompts(path, text)
    if not prompts:
        raise UsageError(f"{path}: found no prompt")
    return prompts


def _json_prompts(path: Path, text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if isinstance(values, list):
        values = {f"prompt {i + 1}": value for i, value in enumerate(values)}
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise UsageError(f"{path}: expected an object of name -> text, or a list of texts")
    return values


def make_inputs(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch: int | None,
    seq_len: int | None,
    device: torch.device,
    seed: int,
) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, [batch, length], padded on the left.

    Prompts are repeated to fill `batch`; with `seq_len` each is cut, or repeated, to exactly that length.
    Without a tokenizer, or without prompts, the ids are drawn at random from the model's vocabulary.
    """
    if tokenizer is None or not texts:
        rows = batch or 1
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, _vocabulary(model), (rows, seq_len or _RANDOM_LENGTH), generator=generator)
        return _for_model(model, ids.to(device), torch.ones_like(ids).to(device))
    rows = batch or len(texts)
    encoded = [_fit(tokenizer(texts[i % len(texts)])["input_ids"], seq_len) for i in range(rows)]
    length = max(map(len, encoded))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded])
    return _for_model(model, ids.to(device), mask.to(device))


def _for_model(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the model's inputs; an encoder-decoder gets the same tokens for both halves."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _fit(ids: list[int], length: int | None) -> list[int]:
    if length is None:
        return ids
    if not ids:
        raise UsageError("a prompt is empty; give some text, or leave --seq-len out")
    return (ids * (length // len(ids) + 1))[:length]


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text_config, "vocab_size", None)
    if not isinstance(size, int):
        raise UsageError(f"{type(model).__name__} tells no vocabulary size; give a model with a tokenizer")
    return size


def make_step(model: Any, inputs: dict[str, Tensor], *, mode: Mode, max_new_tokens: int) -> Step:
    """Return a function that runs one step of `mode` on the inputs."""
    if mode == "train":
        return _training_step(model.train(), inputs)
    model.eval()
    call = partial(model, **inputs)
    if mode == "generate":  # exactly this many tokens, so that steps are equal
        sizes = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        call = partial(model.generate, **inputs, **sizes, do_sample=False)
    return torch.no_grad()(call)


def _training_step(model: Any, inputs: dict[str, Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
