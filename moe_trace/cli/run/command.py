"""Run a model, or a program of your own, under torch.profiler and record what the routers decide.

Writes one trace (for TensorBoard, Perfetto, chrome://tracing and `moe-trace report`) and TensorBoard
scalars to a folder, then prints the metrics of each layer.

A program runs unchanged, as it would under Python: options come before its name, and everything after it
is passed on. Every model with routers that the program calls is recorded. If the program uses
torch.profiler, the routing is added to the traces it writes; otherwise --steps are profiled. A step is an
optimizer step with all its forwards or, if nothing is trained, one forward. Under `torchrun -m moe_trace
run SCRIPT`, each process writes a trace.

Example: moe-trace run --steps 10-12 --out runs/mine train.py --learning-rate 1e-4
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_trace.cli.arguments import add_output, parse_names, parse_numbers
from moe_trace.cli.run.program import (
    SCRIPT_STEPS,
    new_folder,
    parse_routes,
    parse_steps,
    print_files,
    print_next,
    record_program,
    settle_steps,
)
from moe_trace.data.display.tables import paragraph
from moe_trace.data.errors import Interrupted, UsageError
from moe_trace.workload.config import DTYPES, EP_IMPLEMENTATIONS, RunConfig, Split, routes_elsewhere
from moe_trace.workload.program.as_main import Program

READS = {"model": ".json", "prompts_file": ".txt", "script": ".py"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_work(parser)
    _add_split(parser)
    add = parser.add_argument
    add("script", nargs="?", type=Path, metavar="SCRIPT", help="Python program to run instead of a model")
    add("script_arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the program")
    of_module = "module to run instead of a model, as with `python -m`, and its arguments"
    add("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ARGS", help=of_module)
    add_output(
        parser,
        "DIR",
        f"output folder (default: a new one in {RunConfig().out}, named after model, mode and time)",
    )


def run(arguments: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "copies")}
    script, module, script_arguments = (values.pop(name) for name in ("script", "module", "script_arguments"))
    values["layers"] = parse_layers(values["layers"])
    if module:
        return record_program(Program(module[0], module[1:], is_module=True), values)
    if script is not None:
        return record_program(Program(str(script), script_arguments), values)
    return _run_models(values)


def _run_models(values: dict[str, Any]) -> int:
    """Record a model once, or once for each prompt and length."""
    settle_steps(values, RunConfig().steps, RunConfig().warmup)
    lengths = parse_numbers("--seq-len", given) if (given := values.pop("seq_len")) is not None else ()
    values["out"] = values["out"] or new_folder(
        values["model"], values["mode"], alone=os.environ.get("WORLD_SIZE", "1") == "1"
    )
    values["split"] = Split(**{field.name: values.pop(field.name) for field in fields(Split)})
    config = RunConfig(**values)
    from moe_trace.show.sweep import render_comparison
    from moe_trace.show.text import render_text
    from moe_trace.workload.process_group import LeaderFailed, RankFailed
    from moe_trace.workload.sweep import variants

    runs = variants(config, lengths)
    if len(runs) > 1 and not isinstance(config.routes, bool):
        raise UsageError(f"--routes {config.routes}: {len(runs)} runs need a file each; leave out its name")
    results = []
    problems: tuple[str, ...] = ()
    for name, run_config in runs:
        try:
            with _no_empty_folder(run_config.out):
                result = _run_with_progress(run_config)
        except LeaderFailed as error:
            return error.exit_code  # rank 0 has printed the error
        if result.summary is None:  # rank 0 prints for all
            continue
        results.append((name, result.summary))
        print(f"== {name}\n" if len(runs) > 1 else "", end="")
        print(render_text(result.summary))
        print_files((*result.files, *routes_elsewhere(run_config, result.files)))
        problems += result.problems
    if not results:
        return 0
    if len(runs) > 1:
        print(f"\n{render_comparison(results)}", end="")
    print_next(config.out, result.trace)
    if problems:
        raise RankFailed(f"{'; '.join(problems)}. The figures above are those of the other ranks")
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    d = RunConfig()
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default=d.model,
        metavar="demo|HUB_ID|PATH|CONFIG.json",
        help="demo model of this package, Hugging Face Hub id, folder, or config.json (default: demo)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="build the model from its config alone, with random weights",
    )
    add("--top-k", type=int, metavar="K", help="experts per token (default: from the model's config)")
    add(
        "--experts-implementation",
        metavar="NAME",
        help="experts implementation in transformers: eager, grouped_mm or batched_mm (default: the "
        "model's own)",
    )
    add(
        "--device",
        default=d.device,
        metavar="auto|cpu|cuda",
        help="device to run on; auto selects a GPU if there is one (default: auto)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="data type of the model (default: float32 on a CPU, bfloat16 on a GPU)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    d = RunConfig()
    add = parser.add_argument_group("workload and recording").add_argument
    modes = "one forward per step, text generation, or training (default: prefill)"
    add("--mode", choices=("prefill", "generate", "train"), default=d.mode, help=modes)
    add("--prompt", metavar="TEXT", help="input text (default: the demo's texts, or one sentence)")
    prompts = "file with one prompt per line, or JSON name -> text: one run per text"
    add("--prompts-file", type=Path, metavar="F", help=prompts)
    which = f"steps to record: a number, or a range from 0 (default: {d.steps}; {SCRIPT_STEPS} for a program)"
    add("--steps", type=parse_steps, metavar="N|A-B", help=which)
    before = f"steps to run before recording (default: {d.warmup}; 0 for a program)"
    add("--warmup", type=int, metavar="N", help=before)
    add("--batch", type=int, metavar="B", help="sequences per step (default: one per prompt)")
    add(
        "--seq-len",
        metavar="T,...",
        help="tokens per sequence, one run per value (default: the prompt's length)",
    )
    tokens = f"tokens generated per step with --mode generate (default: {d.max_new_tokens})"
    add("--max-new-tokens", type=int, default=d.max_new_tokens, metavar="N", help=tokens)
    add(
        "--layers",
        metavar="0,3,L05",
        help="record only these routers: indices, labels or module paths (default: all)",
    )
    every = f"record every N-th step (default: {d.every})"
    add("--every", type=int, default=d.every, metavar="N", help=every)
    add(
        "--routes",
        nargs="?",
        type=parse_routes,
        const=True,
        default=d.routes,
        metavar="FILE.npz",
        help="also record which token went to which expert, in a file next to the trace, or in this file "
        "during the run",
    )
    add("--record-shapes", action="store_true", help="record operator shapes, as torch.profiler does")
    add("--with-stack", action="store_true", help="record source lines, as torch.profiler does")


def _add_split(parser: argparse.ArgumentParser) -> None:
    d = Split()
    group = parser.add_argument_group(
        "multiple processes",
        paragraph(
            "for use with `torchrun --nproc-per-node N -m moe_trace run ...`; each process writes a trace"
        ),
    )
    add = group.add_argument
    shards = "number of processes that shard the weights, each with its own tokens (FSDP 2)"
    add("--fsdp", type=int, default=d.fsdp, metavar="N", help=shards)
    splits = "number of processes that split the matrices and share the same tokens"
    add("--tp", type=int, default=d.tp, metavar="N", help=splits)
    add(
        "--ep",
        type=int,
        default=d.ep,
        metavar="N",
        help="number of these processes (fsdp x tp) among which the experts are divided",
    )
    how = "how tokens reach their experts (default: auto)"
    add("--ep-implementation", choices=EP_IMPLEMENTATIONS, default=d.ep_implementation, help=how)
    add(
        "--ddp",
        action="store_true",
        help="replicate the whole model in every process, each with its own tokens",
    )
    add(
        "--rank-timeout",
        type=float,
        default=RunConfig().rank_timeout,
        metavar="S",
        help=f"seconds that rank 0 waits for the others' traces (default: {RunConfig().rank_timeout:g})",
    )


def parse_layers(text: str | None) -> tuple[int | str, ...] | None:
    """Parse layers: `0,3,L05` gives (0, 3, "L05")."""
    if text is None:
        return None
    return tuple(int(part) if part.isdigit() else part for part in parse_names(text))


def _run_with_progress(config: RunConfig):  # type: ignore[no-untyped-def]  # torch stays unimported here
    # Kineto logs a line to stderr at each start and stop of a profiler; torch reads this variable on import.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from moe_trace.data.display.progress import progress_bar
    from moe_trace.workload.models import hide_progress_bars
    from moe_trace.workload.runner import run

    draws = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if not draws:
        hide_progress_bars()
    with progress_bar(draws) as tell:
        return run(config, tell)


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a folder that the run created if the run ends before writing to it.

    Raises:
        Interrupted: Ctrl-C was pressed before there was anything to keep.
    """
    existed = folder.exists()
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the first recorded step; nothing was written") from None
    finally:
        if not existed:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()
