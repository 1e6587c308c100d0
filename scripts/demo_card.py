"""Measure the demo model on held-out text and write its model card.

`evaluate` returns one `DomainResult` per domain, and the `_section` functions format it as Markdown.
Array names end in their shape: L layers, E experts.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from demo_corpus import Corpus
from torch import nn

EVALUATED_ROWS = 64  # sequences per domain, spread evenly over its held-out text
ACTIVE_SHARE = 0.25  # an expert counts as used if it gets a quarter of an even share


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """Measurements of the model on one domain's held-out text."""

    unigram_entropy: float
    """Entropy of the evaluated bytes, in nats per byte: the lowest loss of a model that ignores context."""
    loss: float
    """Mean negative log-likelihood, in nats per byte."""
    counts_LE: np.ndarray
    """Assignments per layer and expert."""
    half_counts_LE: tuple[np.ndarray, np.ndarray]
    """The same for odd and even rows, which shows how much two samples of one domain differ by chance."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Description of the training run, for the card."""

    args: argparse.Namespace
    config: transformers.OlmoeConfig
    train_loss: float
    seconds: float
    weights: Path


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], np.ndarray]]:
    """Count the expert ids that the experts receive while the context is active.

    Yields a function that returns the counts so far, int64 of shape (L, E), and resets them to zero.
    """
    layers: Any = model.get_submodule("model.layers")
    counts_LE = np.zeros((len(layers), layers[0].mlp.experts.num_experts), dtype=np.int64)

    def make_hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            ids = inputs[1].flatten().cpu().numpy()
            counts_LE[layer] += np.bincount(ids, minlength=counts_LE.shape[1])

        return hook

    def take() -> np.ndarray:
        taken = counts_LE.copy()
        counts_LE[:] = 0
        return taken

    handles = [layer.mlp.experts.register_forward_pre_hook(make_hook(i)) for i, layer in enumerate(layers)]
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def entropy(counts: np.ndarray) -> float:
    """Return the entropy, in nats, of a distribution given as counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def divergence(counts_DE: Sequence[np.ndarray]) -> float:
    """Return the Jensen-Shannon divergence of D distributions, in nats: 0 if equal, ln D if disjoint."""
    shares = [counts / counts.sum() for counts in counts_DE]
    return entropy(np.mean(shares, axis=0)) - float(np.mean([entropy(share) for share in shares]))


def _evaluate_domain(
    model: nn.Module, tokens: torch.Tensor, length: int, take: Callable[[], np.ndarray]
) -> DomainResult:
    starts = np.linspace(0, len(tokens) - length, EVALUATED_ROWS).astype(int)
    rows_RT = torch.stack([tokens[start : start + length] for start in starts])
    device = next(model.parameters()).device
    halves, losses = [], []
    for half_RT in (rows_RT[0::2], rows_RT[1::2]):
        ids = half_RT.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
        )
        losses.append(loss.item())
        halves.append(take())
    return DomainResult(
        unigram_entropy=entropy(np.bincount(rows_RT.flatten().numpy())),
        loss=float(np.mean(losses)),
        counts_LE=halves[0] + halves[1],
        half_counts_LE=(halves[0], halves[1]),
    )


def evaluate(model: nn.Module, held_out: dict[str, torch.Tensor], length: int) -> dict[str, DomainResult]:
    """Measure loss and routing of `model` on each domain's held-out token ids, in rows of `length` tokens."""
    model.eval()
    with torch.no_grad(), counting(model) as take:
        return {domain: _evaluate_domain(model, tokens, length, take) for domain, tokens in held_out.items()}


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _load(counts_E: np.ndarray) -> tuple[str, str, int]:
    """Return load max÷mean, coefficient of variation and number of used experts of one layer."""
    mean = counts_E.mean()
    active = int((counts_E >= ACTIVE_SHARE * mean).sum())
    return f"{counts_E.max() / mean:.2f}", f"{counts_E.std() / mean:.2f}", active


def _data_section(corpora: list[Corpus]) -> str:
    rows = [
        [corpus.domain, s.package, s.version, s.what, s.licence, s.documents, s.size_bytes, f"`{s.sha256}`"]
        for corpus in corpora
        for s in corpus.sources
    ]
    header = ["domain", "package", "version", "what", "licence", "documents", "bytes", "SHA-256"]
    split = ", ".join(
        f"{c.domain} {sum(len(t.encode()) for t in c.train):,} / {sum(len(t.encode()) for t in c.held_out):,}"
        for c in corpora
    )
    return (
        f"{_table(header, rows)}\n\n"
        "`python` is the interpreter that read the text out of the packages. The hash is of the source's "
        "documents after cleaning (repeated blocks dropped, at most 24 000 characters a document), joined "
        "by a zero byte. The version of Python decides the code, the character names and so the hash.\n\n"
        f"Split by document, by the hash of its name; bytes to train on / held out: {split}."
    )


def _loss_section(untrained: dict[str, DomainResult], trained: dict[str, DomainResult]) -> str:
    rows = [
        [
            domain,
            f"{result.unigram_entropy:.3f}",
            f"{untrained[domain].loss:.3f}",
            f"{result.loss:.3f}",
            f"{result.loss / result.unigram_entropy:.2f}",
        ]
        for domain, result in trained.items()
    ]
    header = [
        "domain",
        "unigram entropy",
        "loss before training",
        "loss of the shipped weights",
        "loss ÷ entropy",
    ]
    return (
        f"{_table(header, rows)}\n\nNats a byte (a token is a byte), on {EVALUATED_ROWS} sequences a domain "
        "of held-out text. The unigram entropy is that of the same bytes: what a model that knows their "
        "frequencies, and no context, would pay."
    )


def _layer_section(untrained: dict[str, DomainResult], trained: dict[str, DomainResult]) -> str:
    rows = []
    results = list(trained.values())
    for layer in range(len(results[0].counts_LE)):
        mean, cv, active = _load(np.sum([r.counts_LE[layer] for r in results], axis=0))
        between = divergence([r.counts_LE[layer] for r in results])
        before = divergence([r.counts_LE[layer] for r in untrained.values()])
        chance = float(np.mean([divergence([half[layer] for half in r.half_counts_LE]) for r in results]))
        rows.append([layer, mean, cv, active, f"{between:.3f}", f"{before:.3f}", f"{chance:.4f}"])
    header = [
        "layer",
        "load max÷mean",
        "load CV",
        "experts in use",
        "JSD between domains",
        "JSD before training",
    ]
    return (
        f"{_table([*header, 'JSD within a domain'], rows)}\n\n"
        "All domains together, in equal shares. In use: at least a quarter of an even share. JSD is the "
        "Jensen-Shannon divergence of the domains' expert distributions, in nats: 0 when they are equal, "
        f"{np.log(len(results)):.3f} when no two domains share an expert. Within a domain: two halves of "
        "its held-out text, the mean over domains."
    )


def _domain_section(trained: dict[str, DomainResult]) -> str:
    rows = []
    for layer in range(len(next(iter(trained.values())).counts_LE)):
        for domain, result in trained.items():
            counts_E = result.counts_LE[layer]
            top = ", ".join(
                f"{e} ({counts_E[e] / counts_E.sum():.0%})" for e in np.argsort(-counts_E, kind="stable")[:4]
            )
            rows.append([layer, domain, *_load(counts_E), top])
    header = [
        "layer",
        "domain",
        "load max÷mean",
        "load CV",
        "experts in use",
        "most preferred experts (share)",
    ]
    return _table(header, rows)


def _training_section(run: Run) -> str:
    args, config = run.args, run.config
    shape = (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} "
        f"heads, {config.num_experts} experts of {config.intermediate_size}, "
        f"top-{config.num_experts_per_tok} without renormalising, vocabulary {config.vocab_size}, positions "
        f"{config.max_position_embeddings}"
    )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU ({platform.machine()})"
    facts = {
        "model": shape,
        "weights": f"`{run.weights.name}`, bfloat16, {run.weights.stat().st_size:,} bytes",
        "SHA-256 of the weights": f"`{hashlib.sha256(run.weights.read_bytes()).hexdigest()}`",
        "seed": args.seed,
        "steps": f"{args.steps} of {args.rows} sequences of {args.seq_len} tokens, "
        "an equal number from every domain",
        "optimizer": f"AdamW, learning rate {args.lr} (warm-up, cosine), betas 0.9 and 0.95, "
        "decay 0.1, clipped at 1.0",
        "load-balancing loss": f"weight {args.aux_coef}, per layer: small, "
        "so that experts may specialise and load is uneven",
        "training loss": f"{run.train_loss:.3f} nats a token, mean of the last 50 steps",
        "machine": f"{device}, {args.threads} threads, {run.seconds / 60:.1f} minutes",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    return _table(["what", "value"], list(facts.items()))


AGAIN = (
    "```\n"
    "apt-get install bible-kjv bible-kjv-text dict-devil sqlite3-doc tzdata\n"
    "python scripts/train_demo_model.py {arguments}\n"
    "```\n"
    "\n"
    "The script needs no network. On a machine without these packages (a GPU server, say), carry "
    "the text there: write it with\n"
    "`--save-corpus DIR` where the packages are, and pass `--corpus DIR`. The device is "
    "`cpu` or `cuda`. Two runs on one\n"
    "machine write the same bytes; another processor, torch version, Python version or number of "
    "threads gives other last\n"
    "digits, and so another hash."
)


def write_card(
    path: Path,
    run: Run,
    corpora: list[Corpus],
    untrained: dict[str, DomainResult],
    trained: dict[str, DomainResult],
) -> None:
    """Write the model card. All of its numbers come from the arguments or from the files themselves."""
    args = run.args
    arguments = (
        f"--steps {args.steps} --rows {args.rows} --seq-len {args.seq_len} --lr {args.lr} "
        f"--aux-coef {args.aux_coef} --seed {args.seed} --threads {args.threads} "
        f"--device {args.device}"
    )
    intro = (
        "A small OLMoE with ByT5's byte tokenizer, made to show true routing: uneven load, and experts that "
        "prefer a domain. It is a demonstration and a test model, of no use as a language model. Load it "
        "with `moe_trace.demo.load_demo_model()`. This file is written by `scripts/train_demo_model.py`."
    )
    sections = {
        "Training": _training_section(run),
        "Data, licences and attribution": _data_section(corpora),
        "Loss on held-out text": _loss_section(untrained, trained),
        "Routing per layer": _layer_section(untrained, trained),
        "Routing per domain": _domain_section(trained),
        "How to run again": AGAIN.format(arguments=arguments),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    path.write_text(f"# Model card: the moe_trace demo model\n\n{intro}\n\n{body}\n", encoding="utf-8")
