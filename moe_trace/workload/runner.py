"""Run a model under the profiler and write the recording."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from moe_trace.data.errors import Interrupted, MoETraceError, NothingRecorded, OutputError, UsageError
from moe_trace.data.summary import Summary
from moe_trace.find.contracts.modules import class_name
from moe_trace.integrations.handler import tensorboard_trace_handler
from moe_trace.read.reader import read_summary
from moe_trace.record.profiler import profile
from moe_trace.workload.config import RunConfig, routes_of
from moe_trace.workload.folder import claim_folder, files_in, traces_in
from moe_trace.workload.inputs import Step, make_inputs, make_step, read_prompts
from moe_trace.workload.models import ModelError, choose_device, load_model
from moe_trace.workload.process_group import (
    LeaderFailed,
    RankFailed,
    Worker,
    is_launched,
    joined,
    missing_files,
)
from moe_trace.workload.sharded import load_split_model, require_support, rows_of_this_process, wrapped

_CLAIM_S = 300.0
_FAILURE_TIMEOUT_S = 5.0  # wait for the others' files after this process has failed: torchrun soon ends it
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunResult:
    """Result of a run."""

    summary: Summary | None
    """Summary of all processes; None except in rank 0."""
    trace: Path
    files: tuple[Path, ...]
    problems: tuple[str, ...] = ()
    """One sentence for each rank that left no file."""


def run(config: RunConfig, progress: Progress = lambda what, done, total: None) -> RunResult:
    """Load, warm up, record, write. Under torchrun every process calls this function.

    Args:
        progress: called with (current activity, completed steps, total steps).

    Raises:
        OutputError: the folder holds files and `force` was not given, or it cannot be written.
        NothingRecorded: no router was called in the recorded steps.
        UsageError: the processes, or the versions of torch and transformers, do not fit the request.
        RankFailed: in rank 0, if this process or another one could not finish the run.
    """
    device = choose_device(config.device)
    if not config.split.is_split:
        _refuse_several_processes()
        trace, prof = _record(config, Worker(), device, progress)
        return RunResult(prof.tracer.summary(), trace, files_in(config.out))
    require_support(config.split, device)
    with joined(device.type, config.split.processes) as worker:
        if device.type == "cuda":
            device = torch.device("cuda", worker.local_rank)
        with _report_failures(worker, config):
            trace, _ = _record(config, worker, device, progress)
            worker.publish("trace", {"file": trace.name, "host": socket.gethostname()})
        if not worker.is_rank0:
            return RunResult(None, trace, (trace,))
        progress("waiting for the others", 1, 1)
        worker.stop.only_note()
        problems = tuple(missing_files(worker, config.out, config.rank_timeout))
        return RunResult(read_summary(config.out), trace, files_in(config.out), problems)


def _refuse_several_processes() -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if is_launched() and count != "1":
        raise UsageError(
            f"torchrun started {count} processes, and nothing says how they split the run: give --ddp, or "
            "--fsdp, --tp and --ep"
        )


def _record(
    config: RunConfig, worker: Worker, device: torch.device, progress: Progress
) -> tuple[Path, profile]:
    earlier = _claim_folder(config, worker)
    total = config.warmup + config.steps
    progress("loading the model", 0, total)
    torch.manual_seed(config.seed)
    step, model = _prepare(config, worker, device)
    prof = _profiler(model, config, device)  # before the warm-up, as it fails if there is no router
    for done in range(config.warmup):
        progress("warming up", done, total)
        _run(step, model)
    done, interrupted = 0, False
    with prof:
        try:
            for done in range(config.steps):
                progress("recording", config.warmup + done, total)
                _run(step, model)
                prof.step()
        except KeyboardInterrupt:
            interrupted = True
            prof.tracer.abandon_calls()
        finally:
            worker.stop.only_note()  # torchrun's signal must not interrupt writing the recording
        progress("writing the trace", total, total)
    if interrupted:
        raise _interrupted(config, worker, earlier, done)
    if not prof.tracer.summary().totals.calls:
        raise NothingRecorded(
            f"found {len(prof.tracer.sites)} routers, but none was called in {config.steps} steps; "
            f"check --layers and --every ({config.every})"
        )
    trace = _written_trace(config, worker, earlier)
    for file in earlier if worker.is_rank0 else []:  # only now, so that a failed run keeps the previous one
        file.unlink(missing_ok=True)
    return trace, prof


def _interrupted(config: RunConfig, worker: Worker, earlier: list[Path], steps: int) -> Interrupted:
    """Return the error after Ctrl-C. An earlier run in the folder is kept, since this one did not finish."""
    ended = f"interrupted after {steps} of {config.steps} recorded steps"
    return Interrupted(
        f"{ended}; what was recorded until then is kept in {_written_trace(config, worker, earlier)}"
    )


def _prepare(config: RunConfig, worker: Worker, device: torch.device) -> tuple[Step, torch.nn.Module]:
    options: dict[str, Any] = {
        "device": device,
        "dtype": _dtype(config, device),
        "random_weights": config.random_weights,
        "top_k": config.top_k,
        "experts_implementation": config.experts_implementation,
    }
    if config.split.is_split:
        model, tokenizer = load_split_model(config.model, config.split, worker, **options)
    else:
        model, tokenizer = load_model(config.model, **options)
    if tokenizer is None and (config.prompt is not None or config.prompts_file is not None):
        raise UsageError(f"{config.model} has no tokenizer, so prompts cannot be used; leave them out")
    texts = _texts(config)
    inputs = make_inputs(
        model,
        tokenizer,
        texts,
        batch=config.batch or _even_rows(len(texts), config, worker),
        seq_len=config.seq_len,
        device=device,
        seed=config.seed,
    )
    if config.split.is_split:
        inputs = rows_of_this_process(model, inputs, worker)
        model = wrapped(model, config.split, config.mode)
    return make_step(model, inputs, mode=config.mode, max_new_tokens=config.max_new_tokens), model


def _even_rows(rows: int, config: RunConfig, worker: Worker) -> int | None:
    """Round up so that all processes with tokens of their own get the same number of rows."""
    if not config.split.is_split:
        return None
    parts = worker.world_size if config.split.ddp else config.split.fsdp
    return -(-rows // parts) * parts


def _run(step: Step, model: torch.nn.Module) -> None:
    try:
        step()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{class_name(model)} failed in its own forward: {str(error).splitlines()[0]}. Check --mode, "
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
        routes=routes_of(config),
        activities=activities,
        record_shapes=config.record_shapes,
        with_stack=config.with_stack,
        on_trace_ready=tensorboard_trace_handler(config.out, use_gzip=True, reduce=config.split.is_split),
    )


@contextmanager
def _report_failures(worker: Worker, config: RunConfig) -> Iterator[None]:
    """Publish a failure of this process to the others; rank 0 then reports the state of all."""
    try:
        yield
    except (MoETraceError, RuntimeError, OSError, MemoryError) as error:
        if not isinstance(error, RankFailed):
            worker.publish("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        if not worker.is_rank0:
            if isinstance(error, MoETraceError) and not isinstance(error, LeaderFailed):
                error.args = (f"rank {worker.rank}: {error}",)
            raise
        if isinstance(error, OutputError | UsageError | NothingRecorded):
            raise
        worker.stop.only_note()
        others = missing_files(worker, config.out, _FAILURE_TIMEOUT_S)
        if not others:  # the failure is this rank's own
            raise
        traces = [file.name for file in traces_in(config.out)]
        raise RankFailed(
            f"the run did not end: {'; '.join(others)}. In {config.out} is what was written until then: "
            f"{', '.join(traces) or 'nothing'}"
        ) from error


def _written_trace(config: RunConfig, worker: Worker, earlier: list[Path]) -> Path:
    name = f".rank{worker.rank}." if worker.store is not None else ""
    known = {file.name for file in earlier}
    traces = [f for f in traces_in(config.out) if name in f.name]
    return [f for f in traces if f.name not in known][-1]


def _claim_folder(config: RunConfig, worker: Worker) -> list[Path]:
    """Create the folder in rank 0, and wait for it in the others, which write into it too.

    Returns the files of an earlier run, which `force` allows to replace.
    """
    if not worker.is_rank0:
        worker.wait_for_leader("folder", _CLAIM_S)
        config.out.mkdir(parents=True, exist_ok=True)  # may be another machine's disk
        return list(files_in(config.out))
    try:
        earlier = claim_folder(config.out, force=config.force)
    except OutputError:
        worker.publish("folder", {"failed": True})
        raise
    worker.publish("folder", {"failed": False})
    return earlier


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
