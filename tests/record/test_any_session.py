"""Tests that every torch profiler that records under an active tracer writes the routing into its traces."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import _KinetoProfile, schedule, tensorboard_trace_handler

import moe_trace
from models import tiny_olmoe
from moe_trace.data.errors import TraceFileError
from paths import ROOT

CPU = [torch.profiler.ProfilerActivity.CPU]
LAYERS = 2
SEAMS = (
    (torch.profiler.profile, "start"),
    (torch.profiler.profile, "step"),
    (_KinetoProfile, "start_trace"),
    (torch.autograd.profiler.profile, "__enter__"),
)
ORIGINALS = [owner.__dict__[name] for owner, name in SEAMS]


@pytest.fixture(autouse=True)
def torch_is_as_it_was() -> Iterator[None]:
    yield
    assert [owner.__dict__[name] for owner, name in SEAMS] == ORIGINALS


@pytest.fixture
def model() -> nn.Module:
    return tiny_olmoe(layers=LAYERS)


def forward(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.randint(0, 60, (1, 6)))


def counts(samples: Any) -> list[tuple[str, list[int]]]:
    return [(s.name, [int(n) for n in s.assignments]) for s in samples]


def in_trace(path: Path) -> list[moe_trace.RoutingSample]:
    recording = moe_trace.read_recording(path)
    assert recording.lost.samples_without_range == 0 and not recording.lost.misread
    return list(recording.samples)


def test_profiler_first_then_tracer(model: nn.Module, tmp_path: Path) -> None:
    with torch.profiler.profile(activities=CPU) as prof, moe_trace.MoETracer(model) as tracer:
        forward(model)
        forward(model)
    prof.export_chrome_trace(str(tmp_path / "t.json"))
    found = in_trace(tmp_path / "t.json")
    assert counts(found) == counts(tracer.samples()) and len(found) == 2 * LAYERS
    assert {s.step for s in found} == {0, 1}, "nobody called prof.step(): each forward is a step"
    assert all(s.placement is not None for s in tracer.samples())


@pytest.mark.parametrize("tracer_outside", [True, False])
def test_each_cycle_of_a_schedule(model: nn.Module, tmp_path: Path, tracer_outside: bool) -> None:
    """Two forwards a step; the profiler is made, and waits, before the tracer or after it."""
    prof = torch.profiler.profile(
        activities=CPU,
        schedule=schedule(wait=1, warmup=1, active=2, repeat=2),
        on_trace_ready=tensorboard_trace_handler(str(tmp_path)),
    )
    tracer = moe_trace.MoETracer(model)
    for one in (tracer, prof) if tracer_outside else (prof, tracer):
        one.start()
    for _ in range(9):
        forward(model)
        forward(model)
        prof.step()
    tracer.stop()
    prof.stop()
    first, second = (in_trace(path) for path in sorted(tmp_path.iterdir()))
    assert len(first) == len(second) == 2 * 2 * LAYERS
    skipped = (
        0 if tracer_outside else 1
    )  # the two forwards before a waiting profiler's first step are two steps
    assert {s.step for s in first} == {2 + skipped, 3 + skipped}
    assert {s.step for s in second} == {6 + skipped, 7 + skipped}
    assert counts(first + second) == counts(s for s in tracer.samples() if s.profiled)


def test_profilers_one_after_another_and_what_lies_between(model: nn.Module, tmp_path: Path) -> None:
    with moe_trace.MoETracer(model) as tracer:
        for name in ("a", "b"):
            forward(model)
            with torch.profiler.profile(activities=CPU) as prof:
                forward(model)
                prof.step()
                forward(model)
            prof.export_chrome_trace(str(tmp_path / f"{name}.json"))
        forward(model)
    a, b = (in_trace(tmp_path / f"{name}.json") for name in "ab")
    assert len(a) == len(b) == 2 * LAYERS
    steps = [s.step for s in tracer.samples()]
    assert steps == sorted(steps) and len(set(steps)) == 7, "each forward is a step of its own"
    assert [s.step for s in a + b] == [1, 1, 2, 2, 4, 4, 5, 5]


class Counting(torch.profiler.profile):
    """A framework's own, which overrides what it likes."""

    stepped = 0

    def start(self) -> None:
        self.stepped = 100
        super().start()

    def step(self) -> None:
        self.stepped += 1
        super().step()


def low_level(run: Callable[[], None]) -> Any:
    prof = _KinetoProfile(activities=CPU)
    prof.start()
    run()
    prof.stop()
    return prof


def stepping_subclass(run: Callable[[], None]) -> Any:
    with Counting(activities=CPU) as prof:
        run()
        prof.step()
    assert prof.stepped == 101
    return prof


def autograd(run: Callable[[], None]) -> Any:
    with torch.autograd.profiler.profile(use_kineto=True) as prof:
        run()
    return prof


def gzipped(run: Callable[[], None]) -> Any:
    with torch.profiler.profile(activities=CPU) as prof:
        run()
    return prof


KINDS = {
    "low level": (low_level, "json"),
    "subclass": (stepping_subclass, "json"),
    "autograd": (autograd, "json"),
    "gzip": (gzipped, "json.gz"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tracer_outside", [True, False])
def test_any_kind_of_profiler(model: nn.Module, tmp_path: Path, kind: str, tracer_outside: bool) -> None:
    profile, ending = KINDS[kind]
    tracer = moe_trace.MoETracer(model)

    def traced() -> None:
        with tracer:
            forward(model)

    if tracer_outside:
        with tracer:
            prof = profile(lambda: forward(model))
    else:
        prof = profile(traced)
    prof.export_chrome_trace(str(tmp_path / f"t.{ending}"))
    assert counts(in_trace(tmp_path / f"t.{ending}")) == counts(tracer.samples())
    assert len(tracer.samples()) == LAYERS


def test_a_profiler_that_another_thread_starts_and_exports(model: nn.Module, tmp_path: Path) -> None:
    def work() -> None:
        with torch.profiler.profile(activities=CPU) as prof:
            forward(model)
        prof.export_chrome_trace(str(tmp_path / "t.json"))

    with moe_trace.MoETracer(model) as tracer:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert counts(in_trace(tmp_path / "t.json")) == counts(tracer.samples())


def test_two_tracers_and_one_that_comes_back(model: nn.Module, tmp_path: Path) -> None:
    other = tiny_olmoe(layers=1, seed=3)
    first, second = moe_trace.MoETracer(model), moe_trace.MoETracer(other)
    with torch.profiler.profile(activities=CPU) as prof:
        with first:
            forward(model)
            with second:
                forward(other)
        with first:
            forward(model)
    prof.export_chrome_trace(str(tmp_path / "t.json"))
    assert len(in_trace(tmp_path / "t.json")) == len(first.samples()) + len(second.samples())
    assert len(first.samples()) == 2 * LAYERS and second.samples()


def test_a_model_that_two_tracers_record_is_in_the_trace_once(model: nn.Module, tmp_path: Path) -> None:
    """With the calls of the one that recorded more; the other thins out, as for scalars of a long run."""
    path = tmp_path / "t.json"
    with moe_trace.MoETracer(model) as whole, moe_trace.MoETracer(model, every=3):
        with torch.profiler.profile(activities=CPU) as prof:
            for _ in range(4):
                forward(model)
        prof.export_chrome_trace(str(path))
    assert counts(in_trace(path)) == counts(whole.samples())


def test_switched_off(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with moe_trace.MoETracer(model, auto_attach=False) as tracer, torch.profiler.profile() as prof:
        assert [owner.__dict__[name] for owner, name in SEAMS] == ORIGINALS
        forward(model)
    prof.export_chrome_trace(str(path))
    with pytest.raises(TraceFileError):
        moe_trace.read_recording(path)
    assert tracer.samples()


def test_a_detached_profiler_is_left_alone(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with moe_trace.MoETracer(model) as tracer, torch.profiler.profile(activities=CPU) as prof:
        tracer.detach(prof)
        forward(model)
        prof.step()
        forward(model)
    assert not any(name in vars(prof) for name in ("start", "step", "stop", "export_chrome_trace"))
    prof.export_chrome_trace(str(path))
    with pytest.raises(TraceFileError):
        moe_trace.read_recording(path)


def test_steps_that_the_user_counts_are_not_counted_twice(model: nn.Module) -> None:
    with torch.profiler.profile(activities=CPU) as prof, moe_trace.MoETracer(model) as tracer:
        for _ in range(3):
            forward(model)
            prof.step()
            tracer.step()
    assert [s.step for s in tracer.samples()] == [0, 0, 1, 1, 2, 2]


def test_merging_by_hand_too_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with torch.profiler.profile(activities=CPU) as prof, moe_trace.MoETracer(model) as tracer:
        forward(model)
    prof.export_chrome_trace(str(path))
    once = in_trace(path)
    tracer.merge_into(path)
    assert counts(in_trace(path)) == counts(once)


class Elsewhere(torch.profiler.profile):
    """Writes where it likes."""

    def export_chrome_trace(self, path: str) -> None:
        super().export_chrome_trace(f"{path}.mine")


def test_what_cannot_be_merged_is_written_as_without_us(model: nn.Module, tmp_path: Path) -> None:
    with moe_trace.MoETracer(model), Elsewhere(activities=CPU) as prof:
        forward(model)
    with pytest.warns(RuntimeWarning, match="a trace has no routing"):
        prof.export_chrome_trace(str(tmp_path / "t.json"))
    assert (tmp_path / "t.json.mine").stat().st_size and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_which_only_the_profiler_can_write(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    with moe_trace.MoETracer(model), torch.profiler.profile(activities=CPU) as prof:
        forward(model)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.warns(RuntimeWarning, match="a trace has no routing.*Permission denied"):
        prof.export_chrome_trace(str(tmp_path / "t.json"))
    assert (tmp_path / "t.json").stat().st_size


def test_a_session_in_which_no_router_ran_is_untouched(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with warnings.catch_warnings(record=True) as told:
        with moe_trace.MoETracer(model), torch.profiler.profile(activities=CPU) as prof:
            torch.ones(2) + 1
        prof.export_chrome_trace(str(path))
    assert b"moe_trace" not in path.read_bytes()
    assert not any("trace" in str(one.message) and "routing" in str(one.message) for one in told)


DROPPED = """
import gc
import torch, moe_trace
from models import tiny_olmoe

start, model = torch.profiler.profile.start, tiny_olmoe(layers=1)
moe_trace.MoETracer(model).start()
assert torch.profiler.profile.start is not start
del model
gc.collect()
assert torch.profiler.profile.start is start
"""


def test_a_tracer_that_is_dropped_with_its_model_takes_its_patches_along() -> None:
    """In a process of its own: the watch on leaks holds the hooks of this one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run([sys.executable, "-c", DROPPED], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_somebody_else_who_wraps_the_same_method_keeps_it(model: nn.Module, tmp_path: Path) -> None:
    tracer = moe_trace.MoETracer(model)
    tracer.start()
    ours = torch.profiler.profile.start
    torch.profiler.profile.start = lambda self: ours(self)  # type: ignore[method-assign]
    theirs = torch.profiler.profile.__dict__["start"]
    try:
        tracer.stop()
        assert torch.profiler.profile.__dict__["start"] is theirs
        with torch.profiler.profile(activities=CPU):
            forward(model)
        assert not tracer.samples()
    finally:
        torch.profiler.profile.start = ORIGINALS[0]  # type: ignore[method-assign]


def test_a_profiler_that_we_cannot_change_is_told_and_goes_on(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prof: Any, tracer: Any, follow: Any) -> None:
        raise TypeError("read-only")

    monkeypatch.setattr("moe_trace.record.sessions.attach_tracer", refuse)
    with moe_trace.MoETracer(model), pytest.warns(UserWarning, match="not added to this profiler's traces"):
        with torch.profiler.profile(activities=CPU) as prof:
            forward(model)
    assert prof.key_averages()
