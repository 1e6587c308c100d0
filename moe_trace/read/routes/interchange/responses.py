"""Responses of inference servers in JSON.

- vLLM (0.21): `prompt_routed_experts` of the response and `choices[i].routed_experts`, as lists of
  [tokens, layers, top_k], or as `{"encoding": "base64", "dtype", "shape", "data"}`.
- SGLang: `meta_info.routed_experts` of /generate, or `choices[i].sgl_ext.routed_experts`: base64 of flat
  int32, so layers and top-k must be given.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_trace.data.errors import TraceFileError, UsageError
from moe_trace.read.routes.interchange.arrays import Capture

_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


def capture_of_responses(
    responses: list[Any], source: str, *, layers: int | None = None, top_k: int | None = None
) -> Capture:
    """Make one sequence of each choice of each response, with prompt tokens before generated ones.

    Raises:
        TraceFileError: No response contains routed experts, or their shapes differ.
        UsageError: They are flat, and layers or top-k were not given.
    """
    sequences = []
    for response in responses:
        for prompt, generated, key in _parts(response):
            arrays = [
                _array(value, source, layers, top_k) for value in (prompt, generated) if value is not None
            ]
            sequences.append((arrays, key, prompt is not None))
    if not sequences:
        raise TraceFileError(
            f"{source}: found no routed_experts in {len(responses)} JSON values; expected responses of a "
            "server that was started with --enable-return-routed-experts"
        )
    shapes = {array.shape[1:] for arrays, _, _ in sequences for array in arrays}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise TraceFileError(
            f"{source}: found routed_experts of [tokens, {', '.join(map(str, sorted(shapes)[0]))}] and other "
            "shapes; expected [tokens, layers, top_k], the same in all responses"
        )
    lengths = [sum(map(len, arrays)) for arrays, _, _ in sequences]
    return Capture(
        np.concatenate([array for arrays, _, _ in sequences for array in arrays]),
        sequences[0][1],
        sequence=np.repeat(np.arange(len(sequences)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        stage_codes=np.concatenate([_stages(arrays, prompt) for arrays, _, prompt in sequences]),
    )


def _stages(arrays: list[np.ndarray], has_prompt: bool) -> np.ndarray:
    """Return prefill for the prompt and decode for the rest, or prefill for all if they are not separate."""
    first = np.zeros(len(arrays[0]), np.uint8)
    return np.concatenate([first, *(np.full(len(a), int(has_prompt), np.uint8) for a in arrays[1:])])


def _parts(response: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield (the prompt's experts or None, the other experts, server) of each choice."""
    if not isinstance(response, dict):
        return
    meta = response.get("meta_info")
    if isinstance(meta, dict) and meta.get("routed_experts") is not None:
        yield None, meta["routed_experts"], "SGLang"
    choices = response.get("choices")
    for choice in choices if isinstance(choices, list) else [response]:
        if not isinstance(choice, dict):
            continue
        extension = choice.get("sgl_ext")
        if isinstance(extension, dict) and extension.get("routed_experts") is not None:
            yield None, extension["routed_experts"], "SGLang"
        elif choice.get("routed_experts") is not None:
            yield response.get("prompt_routed_experts"), choice["routed_experts"], "vLLM"


def _array(value: Any, source: str, layers: int | None, top_k: int | None) -> np.ndarray:
    try:
        if isinstance(value, str):
            return _decode(base64.b64decode(value, validate=True), layers, top_k)
        if isinstance(value, dict) and value.get("encoding") == "base64":
            if value["dtype"] not in _DTYPES:
                raise ValueError(f"dtype {value['dtype']!r:.40}")
            data = base64.b64decode(value["data"], validate=True)
            return np.frombuffer(data, np.dtype(value["dtype"]).newbyteorder("<")).reshape(value["shape"])
        array = np.array(value)
        if array.dtype.kind not in "iu" or array.ndim != 3:
            raise ValueError(f"{array.dtype} {array.shape}")
        return array
    except (ValueError, KeyError, TypeError, OverflowError, binascii.Error) as error:
        raise TraceFileError(
            f"{source}: found routed_experts that are no [tokens, layers, top_k] of integers "
            f"({error!s:.100}); expected lists, or base64 with --layers and --top-k that fit"
        ) from error


def _decode(data: bytes, layers: int | None, top_k: int | None) -> np.ndarray:
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    if layers is None or top_k is None:
        raise UsageError("found flat routed_experts in base64, expected --layers N and --top-k K beside them")
    return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)
