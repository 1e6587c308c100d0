"""Run a model under the profiler and write what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from moe_trace.errors import NothingRecorded, OutputError, UsageError
from moe_trace.profiler import profile, tensorboard_trace_handler
from moe_trace.summary import Summary
from moe_trace.workload.config import RunConfig
from moe_trace.workload.inputs import make_inputs, read_prompts
from moe_trace.workload.models import ModelError, choose_device, load_model
from moe_trace.workload.steps import Step, make_step

OUTPUT_PATTERNS = ("*.pt.trace.json", "*.pt.trace.json.gz", "events.out.tfevents.*")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    summary: Summary
    trace: Path
    files: tuple[Path, ...]


def run(config: RunConfig, progress: Progress = lambda what, done, total: None) -> RunResult:
    """Load, warm up, record, write.

    Args:
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        OutputError: the folder holds files and `force` was not given, or cannot be written.
        NothingRecorded: no router was called in the recorded steps.
    """
    earlier = _claim_folder(config)
    progress("loading the model", 0, config.warmup + config.steps)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(
        config.model, device=device, dtype=_dtype(config, device), random_weights=config.random_weights
    )
    if tokenizer is None and (config.prompt is not None or config.prompts_file is not None):
        raise UsageError(f"{config.model} has no tokenizer, so prompts cannot be used; leave them out")
    inputs = make_inputs(
        model,
        tokenizer,
        _texts(config),
        batch=config.batch,
        seq_len=config.seq_len,
        device=device,
        seed=config.seed,
    )
    step = make_step(model, inputs, mode=config.mode, max_new_tokens=config.max_new_tokens)
    total = config.warmup + config.steps
    prof = _profiler(model, config, device)  # before the warm-up: it knows whether there is a router at all
    for done in range(config.warmup):
        progress("warming up", done, total)
        _run(step, model)
    with prof:
        for done in range(config.steps):
            progress("recording", config.warmup + done, total)
            _run(step, model)
            prof.step()
        progress("writing the trace", total, total)
    for file in earlier:  # only now: a run that fails leaves the one before it
        file.unlink(missing_ok=True)
    return _result(prof, config)


def _run(step: Step, model: torch.nn.Module) -> None:
    try:
        step()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} failed in its own forward: {str(error).splitlines()[0]}. Check --mode, "
            "--seq-len, --dtype and the config"
        ) from error


def _profiler(model: torch.nn.Module, config: RunConfig, device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        model,
        layers=config.layers,
        every=config.every,
        activities=activities,
        record_shapes=config.record_shapes,
        with_stack=config.with_stack,
        on_trace_ready=tensorboard_trace_handler(config.out, use_gzip=True),
    )


def _result(prof: profile, config: RunConfig) -> RunResult:
    summary = prof.tracer.summary()
    if not summary.totals.calls:
        raise NothingRecorded(
            f"found {len(prof.tracer.sites)} routers, but none was called in {config.steps} steps; "
            f"check --layers and --every ({config.every})"
        )
    files = tuple(sorted(f for pattern in OUTPUT_PATTERNS for f in config.out.glob(pattern)))
    traces = [f for f in files if ".pt.trace.json" in f.name]
    return RunResult(summary, traces[-1], files)


def _claim_folder(config: RunConfig) -> list[Path]:
    """Make the folder; returns what an earlier run wrote into it, which `force` allows to replace."""
    try:
        if config.out.exists() and not config.out.is_dir():
            raise OutputError(f"{config.out} is a file; give a folder with --out")
        earlier = [f for pattern in OUTPUT_PATTERNS for f in config.out.glob(pattern)]
        if config.out.exists() and any(config.out.iterdir()) and not config.force:
            raise OutputError(
                f"{config.out} exists and is not empty; add --force to replace the run in it, "
                "or choose another folder with --out"
            )
        config.out.mkdir(parents=True, exist_ok=True)
        return earlier
    except OSError as error:
        raise OutputError(
            f"{config.out}: cannot be written ({error.strerror}); choose another --out"
        ) from error


def _dtype(config: RunConfig, device: torch.device) -> torch.dtype | None:
    if config.dtype is not None:
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if config.model == "demo":
        return torch.float32 if device.type == "cpu" else None
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _texts(config: RunConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts_file is not None:
        return list(read_prompts(config.prompts_file).values())
    if config.model == "demo":
        from moe_trace.demo import DEMO_PROMPTS

        return list(DEMO_PROMPTS.values())
    return ["A router sends each token to a few of many experts."]
