"""The shipped model: loads offline, predicts far better than byte frequencies do, and routes by domain."""

from __future__ import annotations

import hashlib
import math
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_trace.demo import DEMO_PROMPTS, demo_path, load_demo_model

MAX_WEIGHTS_BYTES = 4_000_000
WEIGHTS = "model.safetensors"
MIN_DIVERGENCE = 0.12  # nats, of ln 4 = 1.39


def fingerprint(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of what the package ships."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refuse_to_connect(*args: object, **kwargs: object) -> None:
    raise AssertionError("loading the demo model opened a connection")


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer, loaded with the network cut off; afterwards the shipped files are unchanged."""
    before = fingerprint(demo_path())
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(socket.socket, "connect", refuse_to_connect)
        patch.setattr(socket, "getaddrinfo", refuse_to_connect)
        yield load_demo_model()
    assert fingerprint(demo_path()) == before


def expert_shares_LE(demo: tuple[Any, Any], text: str) -> torch.Tensor:
    """Share of the assignments of each expert, from what the experts were really given; rows sum to 1."""
    model, tokenizer = demo
    ids_by_layer: list[torch.Tensor] = []

    def remember(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        ids_by_layer.append(inputs[1].flatten())

    handles = [layer.mlp.experts.register_forward_pre_hook(remember) for layer in model.model.layers]
    try:
        model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))
    finally:
        for handle in handles:
            handle.remove()
    experts = model.config.num_experts
    return torch.stack([torch.bincount(ids, minlength=experts) / len(ids) for ids in ids_by_layer])


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Nats, over the last dimension."""
    return torch.special.entr(shares).sum(-1)


def test_import_needs_no_torch() -> None:
    code = "import sys, moe_trace.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loads_offline_and_ready_to_use(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    assert not model.training
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size


def test_shape_is_what_the_demo_promises(demo: tuple[Any, Any]) -> None:
    config = demo[0].config
    assert config.num_hidden_layers >= 4
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (16, 4, False)
    assert config.max_position_embeddings >= 512


def test_weights_are_small_and_named_in_the_card() -> None:
    weights = demo_path() / WEIGHTS
    assert weights.stat().st_size <= MAX_WEIGHTS_BYTES
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (demo_path() / "MODEL_CARD.md").read_text(
        "utf-8"
    )


@pytest.mark.parametrize("domain", DEMO_PROMPTS)
def test_predicts_better_than_byte_frequencies(demo: tuple[Any, Any], domain: str) -> None:
    model, tokenizer = demo
    text = DEMO_PROMPTS[domain]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids.shape == (1, len(text.encode()))
    loss = model(input_ids=ids, labels=ids).loss.item()
    counts = Counter(text.encode())
    unigram = -sum(n / ids.numel() * math.log(n / ids.numel()) for n in counts.values())
    assert loss < 0.6 * unigram, f"{domain}: {loss:.2f} nats a byte, unigram entropy {unigram:.2f}"


def test_domains_prefer_different_experts(demo: tuple[Any, Any]) -> None:
    shares_DLE = torch.stack([expert_shares_LE(demo, text) for text in DEMO_PROMPTS.values()])
    divergence_L = entropy(shares_DLE.mean(0)) - entropy(shares_DLE).mean(0)
    assert divergence_L.max() > MIN_DIVERGENCE, f"Jensen-Shannon divergence per layer, nats: {divergence_L}"
    assert divergence_L.min() > MIN_DIVERGENCE / 3, divergence_L
    favourites = [len(set(layer.tolist())) for layer in shares_DLE.argmax(-1).T]
    assert min(favourites) >= 3, f"different favourite experts of the four domains, per layer: {favourites}"


def test_load_is_uneven_but_not_collapsed(demo: tuple[Any, Any]) -> None:
    """A random model fails the second half: in its deeper layers 5 to 10 experts get nearly every token."""
    shares_LE = expert_shares_LE(demo, "\n".join(DEMO_PROMPTS.values()))
    load_max_over_mean_L = shares_LE.max(-1).values * shares_LE.shape[-1]
    assert load_max_over_mean_L.max() > 1.5, load_max_over_mean_L
    in_use_L = (shares_LE > 0.25 / shares_LE.shape[-1]).sum(-1)
    assert in_use_L.min() >= 12, in_use_L
    assert load_max_over_mean_L.max() < 3.6, "nearly every token goes to one expert"


def test_continues_a_prompt(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    ids = tokenizer(DEMO_PROMPTS["json"][:200], return_tensors="pt", add_special_tokens=False)
    continued = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert '": ' in tokenizer.decode(continued[0, ids.input_ids.shape[1] :])
