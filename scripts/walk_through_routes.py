"""Make the routes, the printed output and the pictures of docs/routes_walkthrough.md.

    python scripts/walk_through_routes.py                     # about five minutes on two CPU cores
    python scripts/walk_through_routes.py --steps 20 --out try --work try/work   # a quick try

A small OLMoE is trained on documentation, code and JSON. Its checkpoints are kept in `--work`, and a second
run reuses them. Each checkpoint, and the demo model of `moe_trace.demo`, then routes the same held-out text.
Their choices are written to routes files, and the output of `moe-trace routes` on these files to pictures.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from demo_corpus import Corpus, is_held_out, read_characters, read_standard_library
from train_demo_model import encode, make_config, make_deterministic, train
from transformers import OlmoeForCausalLM

import moe_trace
from moe_trace.cli import main as moe_trace_command
from moe_trace.demo import load_demo_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pictures import write_small  # noqa: E402

from tests.browser.harness import Internet, chromium, find_chromium, offline_context  # noqa: E402

SHARES = (0.0, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 0.75, 1.0)
"""Shares of the training steps after which a checkpoint is kept."""
ROWS = 6
"""Number of routed sequences of each domain."""
WIDTH = 1100
LAYER, EXPERT_LAYER = 2, 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--work", type=Path, default=ROOT / "moe_trace_runs" / "walkthrough")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=9, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.set_defaults(lr=3e-3, aux_coef=5e-4, seed=20260, threads=1, device="cpu")
    return parser.parse_args()


def read_corpora() -> list[Corpus]:
    """Read documentation of this package, a part of Python's standard library, and its characters as JSON."""
    guides = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
    sources = {
        "docs": [(guide.name, guide.read_text(encoding="utf-8")) for guide in guides],
        "code": list(read_standard_library())[::4],
        "json": list(read_characters()),
    }
    corpora = []
    for domain, documents in sources.items():
        kept = [text for name, text in documents if not is_held_out(name)]
        held_out = [text for name, text in documents if is_held_out(name)]
        corpora.append(Corpus(domain=domain, train=kept, held_out=held_out, sources=[]))
    return corpora


def train_checkpoints(corpora: list[Corpus], args: argparse.Namespace) -> dict[int, Path]:
    """Return a mapping from steps to the weights after them, trained now or by an earlier run."""
    steps = sorted({round(share * args.steps) for share in SHARES})
    files = {step: args.work / f"step{step:05d}.pt" for step in steps}
    if all(file.exists() for file in files.values()):
        return files
    model = new_model(args)

    def keep(step: int) -> None:
        if step in files:
            torch.save(model.state_dict(), files[step])

    keep(0)
    train(model, corpora, args, after_step=keep)
    return files


def new_model(args: argparse.Namespace) -> OlmoeForCausalLM:
    """Return an untrained model of the demo model's shape."""
    config = make_config(args.aux_coef, args.seq_len)
    return OlmoeForCausalLM._from_config(config, experts_implementation="eager")


def held_out_rows(corpus: Corpus, args: argparse.Namespace) -> torch.Tensor:
    """Return [ROWS, seq_len] token ids of documents that were not used in training."""
    stream = encode(corpus.held_out)
    return stream[: ROWS * args.seq_len].view(ROWS, args.seq_len)


def record(model: OlmoeForCausalLM, ids_RT: torch.Tensor, file: Path) -> Path:
    """Route the tokens once and save their routes."""
    options = moe_trace.Routes(weights=True, token_ids=True)
    with moe_trace.MoETracer(model.eval(), routes=options) as tracer, torch.no_grad():
        model(input_ids=ids_RT, attention_mask=torch.ones_like(ids_RT), use_cache=False)
    tracer.routes().save(file)
    print(f"wrote {file}: {len(tracer.routes()):,} tokens, {file.stat().st_size / 1000:.0f} kB")
    return file


def record_all(corpora: list[Corpus], args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Return files of the checkpoints on all domains together, and of the demo model, one per domain."""
    rows = {corpus.domain: held_out_rows(corpus, args) for corpus in corpora}
    together = torch.cat([ids_RT[: ROWS // 2] for ids_RT in rows.values()])
    model, checkpoints = new_model(args), []
    for step, weights in train_checkpoints(corpora, args).items():
        model.load_state_dict(torch.load(weights))
        checkpoints.append(record(model, together, args.work / f"step {step}.routes.npz"))
    demo, _ = load_demo_model(experts_implementation="eager")
    return checkpoints, [record(demo, ids, args.work / f"{name}.routes.npz") for name, ids in rows.items()]


def command(*words: str | Path) -> None:
    """Run a command of moe-trace and print its output."""
    given = [word.name if isinstance(word, Path) else word for word in words]
    print("$ moe-trace " + shlex.join(given), flush=True)
    if moe_trace_command(given):
        raise SystemExit("the command failed")


def take_pictures(pages: dict[str, Path], out: Path) -> None:
    """Take pictures of single figures, and of the tokens of the demo model."""
    executable = find_chromium()
    if executable is None:
        raise SystemExit("found no Chromium")
    with chromium(executable) as browser, offline_context(browser, Internet()) as context:
        page = context.new_page()
        page.set_viewport_size({"width": WIDTH, "height": 900})
        for name, (kind, key, layer) in FIGURES.items():
            page.goto(pages[kind].as_uri())
            page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 3")
            if layer is not None:
                move(page, f"#routes0-{key}-step", layer)
            picture = page.locator(f"figure:has(#routes0-{key})").screenshot()
            write_small(out / f"routes_{name}.png", picture)
        page.goto(pages["code"].as_uri())
        page.wait_for_selector(".tokens .token")
        move(page, ".token-view label:text-is('Layer') + input", EXPERT_LAYER)
        page.locator(".tokens .token").nth(150).click()
        write_small(out / "routes_tokens.png", page.screenshot())
        page.locator(".expert-chip").nth(busiest(page)).click()
        write_small(out / "routes_expert.png", page.screenshot())


FIGURES: dict[str, tuple[str, str, int | None]] = {
    "saturation": ("checkpoints", "saturation", None),
    "domains": ("domains", "domains", LAYER),
    "coactivation": ("domains", "coactivation", LAYER),
    "transition": ("domains", "transition", LAYER),
    "reuse": ("domains", "reuse", None),
    "distinct": ("domains", "distinct", None),
    "cache": ("domains", "cache", None),
}
"""Picture -> page, figure, and position of its slider."""


def move(page: Any, slider: str, value: int) -> None:
    page.locator(slider).evaluate(
        "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )
    page.wait_for_timeout(500)


def busiest(page: Any) -> int:
    """Return the expert of the shown layer with the most assignments."""
    found = page.locator(".expert-chip").evaluate_all(
        "all => all.map(e => Number(e.title.match(/: ([\\d,]+) /)[1].replaceAll(',', '')))"
    )
    return int(max(range(len(found)), key=found.__getitem__))


def main() -> None:
    args = parse_arguments()
    args.out, args.work = args.out.resolve(), args.work.resolve()
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    make_deterministic(args.seed, args.threads, args.device)
    checkpoints, domains = record_all(read_corpora(), args)
    os.chdir(args.work)  # commands and pages then show relative paths
    command("routes", "study", *checkpoints)
    command("routes", "study", *domains)
    command("routes", "cache", domains[1], "--experts-in-memory", "4,8,12", "--each-token")
    pages = {name: Path.cwd() / f"{name}.html" for name in ("checkpoints", "domains", "code")}
    view = ("routes", "view", "--tokenizer", "demo", "-f", "-o")
    command(*view, pages["checkpoints"], *checkpoints)
    command(*view, pages["domains"], *domains)
    command(*view, pages["code"], domains[1])
    take_pictures(pages, args.out)


if __name__ == "__main__":
    main()
