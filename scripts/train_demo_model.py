"""Train the demo model of `moe_trace.demo` and write its weights and its model card.

    python scripts/train_demo_model.py                            # about 17 minutes on two CPU cores
    python scripts/train_demo_model.py --device cuda              # as shipped: 6 minutes on an H200
    python scripts/train_demo_model.py --steps 20 --out try       # a quick try

Training is deterministic: on one machine, with the same torch and number of threads, two runs write the same
bytes. Tensor names end in their shape: R rows, T tokens per row, L layers, E experts.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS reads it once; without it, sums may differ

import torch
from demo_card import Run, evaluate, write_card
from demo_corpus import DOMAINS, Corpus, build_corpus, load_corpora, save_corpora
from transformers import ByT5Tokenizer, OlmoeConfig, OlmoeForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "moe_trace" / "demo"
MAX_WEIGHTS_BYTES = 4_000_000
BYTE_OFFSET = 3  # ByT5: ids 0, 1, 2 are padding, end and unknown
END_ID = 1
WARMUP_STEPS = 100
FINAL_LEARNING_RATE_SHARE = 0.05


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model of moe_trace and write its model card."
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder to write to (default: the package's)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument(
        "--rows", type=int, default=16, help="sequences per step, an equal number from every domain"
    )
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--aux-coef", type=float, default=5e-4, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=20260, help="seed of the weights and of the data order")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; a different number changes the last digits"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--save-corpus", type=Path, metavar="DIR", help="write the text to DIR and stop")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="read the text from DIR, not from the packages"
    )
    return parser.parse_args()


def make_deterministic(seed: int, threads: int, device: str) -> None:
    """Make torch deterministic. On CUDA it only warns, because a few kernels have no deterministic form."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")


def make_config(aux_coef: float, seq_len: int) -> OlmoeConfig:
    """Return a small OLMoE-1B-7B: top-k of a softmax, not renormalised; 4 layers, 4 of 16 experts."""
    return OlmoeConfig(
        vocab_size=len(ByT5Tokenizer()),
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        router_aux_loss_coef=aux_coef,
        max_position_embeddings=max(2048, seq_len),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END_ID,
    )


def encode(documents: list[str]) -> torch.Tensor:
    """Return one int64 vector of token ids, with an end token after each document."""
    ids: list[int] = []
    for text in documents:
        ids.extend(byte + BYTE_OFFSET for byte in text.encode())
        ids.append(END_ID)
    return torch.tensor(ids)


def draw_batches(corpora: list[Corpus], args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield one (R, T) batch per step. Row r is from domain r modulo D, at an offset drawn with the seed."""
    streams = [encode(corpus.train) for corpus in corpora]
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        rows = []
        for row in range(args.rows):
            stream = streams[row % len(streams)]
            first = int(torch.randint(len(stream) - args.seq_len, (), generator=generator))
            rows.append(stream[first : first + args.seq_len])
        yield torch.stack(rows)


def learning_rate_share(step: int, steps: int) -> float:
    """Return linear warm-up, then half a cosine down to `FINAL_LEARNING_RATE_SHARE`."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * (FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine)


def make_optimizer(model: OlmoeForCausalLM, lr: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices only, since norms have no scale to shrink."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def load_imbalance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return the Switch Transformer's balancing loss, averaged over layers: top_k if even, up to E if not.

    transformers pools all layers before it takes the product. Layers that collapse onto different experts
    then look balanced together (after 60 steps 5 of 16 experts were in use, and the pooled value was 4.1).
    """
    losses = []
    for logits_NE in router_logits:
        probabilities_NE = logits_NE.float().softmax(dim=-1)
        chosen_NE = torch.zeros_like(probabilities_NE).scatter_(-1, probabilities_NE.topk(top_k).indices, 1.0)
        losses.append(logits_NE.shape[-1] * (chosen_NE.mean(0) * probabilities_NE.mean(0)).sum())
    return torch.stack(losses).mean()


def train(
    model: OlmoeForCausalLM,
    corpora: list[Corpus],
    args: argparse.Namespace,
    after_step: Callable[[int], None] = lambda _: None,
) -> float:
    """Train `model` in place and return the mean training loss (nats per token) of the last 50 steps.

    `after_step` is called with the number of finished steps.
    """
    optimizer = make_optimizer(model, args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, args.steps)
    )
    model.train()
    model.router_aux_loss_coef = 0.0  # the balancing loss is added below, per layer
    losses: list[torch.Tensor] = []
    start = time.monotonic()
    for step, ids_RT in enumerate(draw_batches(corpora, args)):
        ids_RT = ids_RT.to(args.device)
        output = model(input_ids=ids_RT, labels=ids_RT, output_router_logits=True, use_cache=False)
        imbalance = load_imbalance(output.router_logits, model.config.num_experts_per_tok)
        (output.loss + args.aux_coef * imbalance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(output.loss.detach())
        after_step(step + 1)
        if step % 50 == 49 or step + 1 == args.steps:
            mean, seconds = torch.stack(losses[-50:]).mean().item(), time.monotonic() - start
            print(
                f"step {step + 1:5d}  loss {mean:.3f}  imbalance {imbalance.item():.2f}  {seconds:.0f} s",
                flush=True,
            )
    return torch.stack(losses[-50:]).mean().item()


def save(model: OlmoeForCausalLM, out: Path) -> Path:
    """Write config and bfloat16 weights; return the weights file. Exit if it exceeds the size limit."""
    model.to(torch.bfloat16).save_pretrained(out)
    weights = out / "model.safetensors"
    weights.chmod(0o644)  # the writer makes it readable by its owner only
    size_bytes = weights.stat().st_size
    if size_bytes > MAX_WEIGHTS_BYTES:
        raise SystemExit(
            f"{weights} has {size_bytes} bytes, the limit is {MAX_WEIGHTS_BYTES}: make the model smaller"
        )
    return weights


def main() -> None:
    args = parse_arguments()
    corpora = load_corpora(args.corpus) if args.corpus else [build_corpus(domain) for domain in DOMAINS]
    if args.save_corpus:
        save_corpora(corpora, args.save_corpus)
        return
    make_deterministic(args.seed, args.threads, args.device)
    config = make_config(args.aux_coef, args.seq_len)
    # With the loop over experts, a training step on a CPU takes a tenth of the grouped kernel's time.
    model = OlmoeForCausalLM._from_config(config, experts_implementation="eager").to(args.device)
    held_out = {corpus.domain: encode(corpus.held_out) for corpus in corpora}
    untrained = evaluate(model, held_out, args.seq_len)
    start = time.monotonic()
    train_loss = train(model, corpora, args)
    seconds = time.monotonic() - start
    weights = save(model, args.out)
    # Measure what ships: the rounded weights, read back from disk.
    saved = OlmoeForCausalLM.from_pretrained(args.out, dtype=torch.float32, experts_implementation="eager")
    trained = evaluate(saved.to(args.device), held_out, args.seq_len)
    run = Run(args=args, config=config, train_loss=train_loss, seconds=seconds, weights=weights)
    write_card(args.out / "MODEL_CARD.md", run, corpora, untrained, trained)


if __name__ == "__main__":
    main()
