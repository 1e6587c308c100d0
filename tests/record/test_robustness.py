"""Tests that after any failure in the model hooks are removed, ranges closed, and recorded data kept."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.data.errors import (
    MoETraceError,
    NoRoutersFound,
    NothingRecorded,
    OutputError,
    TraceFileError,
    UsageError,
)
from spliced import recording_in

CPU = [ProfilerActivity.CPU]


GATE_1 = "model.layers.1.mlp.gate"


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def dense_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def test_dense_model_is_refused_with_advice() -> None:
    with pytest.raises(
        NoRoutersFound, match=r"found 0 routers in LlamaForCausalLM; known adapters: .*moe-trace routers"
    ):
        moe_trace.find_routers(dense_model())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["gate", "experts", "attention"])
def test_exception_inside_the_forward(error: type[BaseException], where: str, tmp_path: Path) -> None:
    model = tiny_olmoe()
    layer = model.model.layers[1]
    target = {"gate": layer.mlp.gate, "experts": layer.mlp.experts, "attention": layer.self_attn}[where]
    before = hook_count(model)
    with pytest.raises(error), torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
        target.forward = _raiser(error)
        model(**token_batch())
    del target.forward
    assert hook_count(model) == before
    assert len(prof.tracer._hooks._ranges) == 0
    per_layer = [s.layer for s in prof.tracer.samples()]
    # Samples so far are kept; the interrupted layer has one only if its experts had received their decision.
    # Of an exception that is no Exception, torch tells no hook.
    received = where == "experts" and issubclass(error, Exception)
    assert per_layer == ([0, 1, 2, 0, 1] if received else [0, 1, 2, 0])
    lost = prof.tracer.recording().lost
    assert lost.calls == ({} if received or where == "attention" else {GATE_1: {"interrupted": 1}})
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    assert recording_in(json.loads(path.read_bytes()))["lost"]["samples_without_range"] == 0


def _raiser(error: type[BaseException]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise error("in the middle of the forward")

    return forward


def test_forward_that_goes_on_after_a_caught_exception() -> None:
    model = tiny_olmoe()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        gate.forward = _raiser(RuntimeError)
        with pytest.raises(RuntimeError):
            model(**token_batch())
        del gate.forward
        model(**token_batch())
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(8) for c in calls]


class OddGate(torch.nn.Module):
    """A router whose output has another form."""

    def __init__(self, gate: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.top_k, self.num_experts = gate, gate.top_k, gate.num_experts

    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits, weights, index = self.inner(hidden_states)
        return {"logits": logits}, weights, index


def test_unreadable_router_is_counted_and_the_forward_goes_on() -> None:
    model = tiny_olmoe()
    batch = token_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        model.model.layers[1].mlp.gate = OddGate(model.model.layers[1].mlp.gate)
        with moe_trace.MoETracer(model) as tracer:
            with pytest.warns(
                RuntimeWarning, match=r"model\.layers\.1\.mlp\.gate \(OddGate\).*expected logits .*dict"
            ):
                found = model(**batch).logits
            with warnings.catch_warnings(record=True) as again:
                model(**batch)
            assert again == []  # once is enough
    assert torch.equal(found, expected)
    assert [s.layer for s in tracer.samples()] == [0, 2, 0, 2]
    summary = tracer.summary()
    assert list(summary.lost.misread) == ["model.layers.1.mlp.gate"]
    assert summary.lost.calls == {GATE_1: {"unreadable": 2}}
    assert any("could not be read" in note for note in summary.notes)


def test_forwards_whose_calls_could_not_be_read_were_not_silent() -> None:
    """The hooks ran: that other code was compiled in the process explains nothing."""
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    model = tiny_olmoe(layers=2)
    for layer in model.model.layers:
        layer.mlp.gate = OddGate(layer.mlp.gate)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told, moe_trace.MoETracer(model) as tracer:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**token_batch())
        lost = tracer.recording().lost
    assert not [str(one.message) for one in told if "no router call was seen" in str(one.message)]
    assert lost.silent_forwards == 0
    assert lost.calls == {site.name: {"unreadable": 2} for site in tracer.sites}
    assert set(lost.misread) == set(lost.calls)


def test_router_that_is_never_called_is_reported(tmp_path: Path) -> None:
    model = tiny_olmoe()
    model.model.layers[2].mlp.forward = lambda hidden_states: hidden_states  # as a fused block would
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    assert recording_in(json.loads(path.read_bytes()))["lost"]["never_called"] == ["model.layers.2.mlp.gate"]
    assert any("never called" in note for note in prof.tracer.summary().notes)


@pytest.mark.parametrize(
    ("arguments", "run", "message"),
    [({}, False, "was not run"), ({"warmup": 9}, True, "warmup=9 left out all of the 1 forwards")],
)
def test_empty_recording_is_said_aloud(tmp_path: Path, arguments: Any, run: bool, message: str) -> None:
    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU, **arguments) as prof:
        if run:
            model(**token_batch())
    path = tmp_path / "trace.json"
    with pytest.warns(RuntimeWarning, match=message):
        prof.export_chrome_trace(str(path))
    assert recording_in(json.loads(path.read_bytes()))["samples"]["call"] == []
    with pytest.raises(NothingRecorded, match="no routing sample"):
        moe_trace.merge_into(path, prof.tracer.samples())


def test_a_warning_that_is_an_error_costs_no_trace(tmp_path: Path) -> None:
    """A profiler exports once: what the user has turned into an error comes after the file is there."""
    prof = torch.profiler.profile(activities=[ProfilerActivity.CPU])
    with moe_trace.MoETracer(tiny_olmoe()) as tracer:
        tracer.attach(prof)
        with prof:
            torch.ones(3).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="recorded no call"):
            prof.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_bytes())["traceEvents"]
    assert any(event.get("name") == "aten::sum" for event in events)


def test_profiler_never_active_is_told_apart(tmp_path: Path) -> None:
    """Samples taken outside the profiler's window are not in the trace, and are not called lost."""
    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
        with torch.profiler.profile(activities=CPU) as prof:
            torch.ones(1)
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    with pytest.raises(NothingRecorded, match="no profiler was recording"):
        moe_trace.merge_into(path, tracer.samples())
    assert "moe_trace" not in json.loads(path.read_bytes())


def test_trace_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = tiny_olmoe()
    path = tmp_path / "trace.json"
    with torch.no_grad(), torch.profiler.profile(activities=CPU) as other:
        model(**token_batch())
    other.export_chrome_trace(str(path))
    before = path.read_bytes()
    with torch.no_grad(), torch.profiler.profile(activities=CPU), moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
    with pytest.raises(NothingRecorded, match="none of the samples was taken in the time"):
        moe_trace.merge_into(path, tracer.samples())
    assert path.read_bytes() == before


def test_links_devices_and_modes_are_respected(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1)
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    prof.export_chrome_trace(str(link))
    assert link.is_symlink()
    assert recording_in(json.loads(real.read_bytes()))
    real.chmod(0o600)
    prof.tracer.merge_into(link)
    assert real.stat().st_mode & 0o777 == 0o600
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    prof.export_chrome_trace(str(pipe))
    reader.join()
    assert pipe.is_fifo()
    assert recording_in(json.loads(received[0]))


def test_array_behind_the_events_is_not_taken_for_them(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1)
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=CPU) as prof,
        moe_trace.MoETracer(model) as tracer,
    ):
        model(**token_batch())
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + ', "extra": [{"a": 1}]}')
    moe_trace.merge_into(path, tracer.samples())
    data = json.loads(path.read_bytes())
    assert data["extra"] == [{"a": 1}]
    assert any(e.get("pid", 0) == 9_000_000 for e in data["traceEvents"])


def test_interrupted_call_is_not_finished_by_the_next_one() -> None:
    """Ctrl-C in a notebook, caught while the tracer stays on."""
    model = tiny_olmoe()
    gate, experts = model.model.layers[0].mlp.gate, model.model.layers[1].mlp.experts
    with torch.no_grad(), warnings.catch_warnings(), moe_trace.MoETracer(model) as tracer:
        warnings.simplefilter("error")
        for module in (gate, experts):
            module.forward = _raiser(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**token_batch())
            del module.forward
        with watch_experts(model) as calls:
            model(**token_batch())
    last = [s for s in tracer.samples() if s.step == 2]
    assert [s.assignments.tolist() for s in last] == [c.assignments(8) for c in calls]
    assert tracer.summary().lost.misread == {}


def test_threads_with_different_needs_lose_nothing_and_are_left_clean() -> None:
    """Every second step of two threads: one thread's idle step must not take the other's hooks off."""
    model = tiny_olmoe(layers=2)
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(60):
                model(**token_batch(1, 4))

    with warnings.catch_warnings(), moe_trace.MoETracer(model, every=2) as tracer:
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = [list(tracer.calls_by_router().values())]
    assert counts == [[tracer.forwards_recorded] * 2]
    assert tracer.summary().lost.misread == {}
    assert hook_count(model) == 0


def test_stopping_in_the_middle_of_another_threads_forward() -> None:
    model = tiny_olmoe(layers=1)
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def wait(module: Any, args: Any) -> None:
        inside.set()
        go_on.wait(20)

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(wait)

    def work() -> None:
        try:
            with torch.no_grad():
                model(**token_batch())
        except BaseException as error:
            errors.append(error)

    tracer = moe_trace.MoETracer(model)
    tracer.start()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    tracer.stop()
    go_on.set()
    thread.join()
    handle.remove()
    assert errors == []
    assert hook_count(model) == 0


def test_ring_overflow_is_counted() -> None:
    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.MoETracer(model, capacity=7) as tracer:
        for _ in range(5):
            model(**token_batch())
    samples = tracer.samples()
    assert len(samples) <= 7
    assert len(samples) + tracer.summary().lost.overwritten == 15
    assert [s.call for s in samples if s.layer == 0][-1] == 4  # the newest are kept
    assert any("capacity" in note for note in tracer.summary().notes)


def test_reentering_an_active_tracer_is_refused_and_a_left_one_goes_on() -> None:
    model = tiny_olmoe()
    tracer = moe_trace.MoETracer(model)
    with torch.no_grad():
        with tracer:
            model(**token_batch())
            with pytest.raises(MoETraceError, match="already active"):
                tracer.start()
        with tracer:
            model(**token_batch())
    assert [s.call for s in tracer.samples() if s.layer == 0] == [0, 1]
    assert hook_count(model) == 0


def test_two_tracers_on_one_model_open_each_range_once(tmp_path: Path) -> None:
    model = tiny_olmoe()
    with torch.no_grad(), torch.profiler.profile(activities=CPU) as prof:
        with moe_trace.MoETracer(model) as outer, moe_trace.MoETracer(model, layers=[0]) as inner:
            model(**token_batch())
    for tracer, count in ((outer, 3), (inner, 1)):
        path = tmp_path / "trace.json"
        if not path.exists():
            prof.export_chrome_trace(str(path))
        tracer.merge_into(path)
        data = json.loads(path.read_bytes())
        names = [e["name"] for e in data["traceEvents"] if e.get("cat") == "user_annotation"]
        assert names.count("moe.router/L00") == 1
        assert len(recording_in(data)["samples"]["call"]) == count
        assert recording_in(data)["lost"]["samples_without_range"] == 0
    assert hook_count(model) == 0


def test_two_models_in_two_threads_do_not_mix() -> None:
    models = [tiny_olmoe(seed=1, experts=8), tiny_olmoe(seed=2, experts=5)]
    outcomes: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        with torch.no_grad(), watch_experts(models[i]) as calls, moe_trace.MoETracer(models[i]) as tracer:
            barrier.wait()
            for step in range(10):
                models[i](**token_batch(seed=10 * i + step))
        outcomes[i] = (tracer.samples(), calls)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, experts in enumerate((8, 5)):
        samples, calls = outcomes[i]
        assert len(samples) == 30
        assert [s.assignments.tolist() for s in samples] == [c.assignments(experts) for c in calls]


def test_profiler_of_all_threads_holds_the_routing_of_each(tmp_path: Path) -> None:
    from torch._C._profiler import _ExperimentalConfig

    models = [tiny_olmoe(seed=1, experts=8), tiny_olmoe(seed=2, experts=5)]
    config = _ExperimentalConfig(profile_all_threads=True)
    prof = torch.profiler.profile(activities=CPU, experimental_config=config)
    tracers = [moe_trace.MoETracer(model) for model in models]
    for tracer in tracers:
        tracer.attach(prof)

    def work(model: Any) -> None:
        with torch.no_grad():
            for _ in range(4):
                model(**token_batch())

    with prof, tracers[0], tracers[1]:
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    recorded = recording_in(json.loads(path.read_bytes()))
    assert recorded["lost"]["samples_without_range"] == recorded["lost"]["ranges_without_sample"] == 0
    sizes = [len(a) for a in recorded["samples"]["assignments"]]
    assert sizes.count(8) == sizes.count(5) == 4 * 3
    assert len({(t, len(a)) for t, a in zip(*_columns(recorded, "thread", "assignments"), strict=True)}) == 2
    for tracer in tracers:
        assert all(s.placement is not None for s in tracer.samples())
    # Models of one class have the same module paths, and are told apart all the same.
    rows = moe_trace.read_summary(path).routers
    assert len({row.info.name for row in rows}) == 6
    for row, expected in zip(rows, [r for t in tracers for r in t.summary().routers], strict=True):
        assert (row.assignments, row.calls) == (expected.assignments, expected.calls)
        assert row.calls == 4


def _columns(recorded: Any, *names: str) -> list[Any]:
    return [recorded["samples"][name] for name in names]


def test_one_model_called_from_two_threads_loses_nothing() -> None:
    model = tiny_olmoe()
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for step in range(10):
                model(**token_batch(seed=seed + step, length=5 + seed))

    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = sorted((s.layer, s.assignments.tolist()) for s in tracer.samples())
    assert found == sorted((c.layer, c.assignments(8)) for c in calls)


@pytest.mark.parametrize(
    "arguments",
    [{"every": 0}, {"warmup": -1}, {"capacity": 0}, {"layers": [99]}, {"layers": lambda s: False}],
)
def test_arguments_out_of_range_are_refused(arguments: Any) -> None:
    with pytest.raises(UsageError):
        moe_trace.MoETracer(tiny_olmoe(), **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"not json at all", "expected"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1}', "truncated"),
        (b"[1, 2, 3]", "expected"),
        (b'{"other": 1}', "an object with events"),
    ],
)
def test_file_that_is_no_trace_is_refused_and_left_alone(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with torch.no_grad(), torch.profiler.profile(activities=CPU):
        with moe_trace.MoETracer(tiny_olmoe()) as tracer:
            tracer.model(**token_batch())
    for name in ("trace.json", "trace.json.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TraceFileError, match=message):
            moe_trace.merge_into(path, tracer.samples())
        assert path.read_bytes() == content
        assert sorted(tmp_path.iterdir()) == sorted(tmp_path.glob("trace.json*"))
    with pytest.raises(TraceFileError, match="cannot be read"):
        moe_trace.merge_into(tmp_path / "missing.json", tracer.samples())


def test_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """/dev/full cannot hold a folder, so a size limit of the process stands in for the full disk."""
    import resource
    import signal

    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OutputError, match="disk full"):
            prof.export_chrome_trace(str(tmp_path / "trace.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_during_the_merge_keeps_the_plain_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any, **kwargs: Any) -> bytes:
        raise OSError(28, os.strerror(28))

    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    monkeypatch.setattr("moe_trace.timeline.merge.encode_recording", no_space)
    path = tmp_path / "trace.json"
    with pytest.raises(OutputError, match="routing could not be added"):
        prof.export_chrome_trace(str(path))
    data = json.loads(path.read_bytes())
    assert "moe_trace" not in data
    assert len(data["traceEvents"]) > 100
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU) as prof:
        model(**token_batch())
    with pytest.raises(OutputError, match="cannot be written"):
        prof.export_chrome_trace(str(tmp_path / "missing" / "trace.json"))
    with pytest.raises(OutputError, match="cannot be written"):
        prof.export_chrome_trace("/proc/trace.json")  # read-only even for root


@pytest.mark.parametrize(("waiting_bytes", "kept"), [(0, 0), (2**20, 4)])
def test_router_outputs_are_let_go_unless_they_are_few(
    monkeypatch: pytest.MonkeyPatch, waiting_bytes: int, kept: int
) -> None:
    """Large forwards are reduced when they end; small ones wait, without their graph, up to a bound."""
    import gc
    import weakref

    from moe_trace.record.calls import recorder as recorder

    monkeypatch.setitem(recorder._WAITING_BYTES_MAX, "cpu", waiting_bytes)
    model = tiny_olmoe(layers=1)
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        alive.append(weakref.ref(output[0]))

    handle = model.model.layers[0].mlp.gate.register_forward_hook(watch)
    with moe_trace.MoETracer(model) as tracer:
        for _ in range(4):
            model(**token_batch())
        gc.collect()
        assert [ref() for ref in alive] == [None] * 4  # with it goes the graph of activations
        pending = tracer._recorder._pending
        assert pending.calls == kept
        assert not any(logits.requires_grad for group in pending.groups() for logits in group.logits)
    assert tracer._recorder._pending.calls == 0
    handle.remove()


def test_idle_steps_have_no_hook_on_any_router() -> None:
    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.MoETracer(model, every=1000) as tracer:
        model(**token_batch())
        model(**token_batch())
        assert hook_count(model) == 4  # two on the model, two on the one inside it
        started = time.perf_counter()
        model(**token_batch())
        assert time.perf_counter() > started
    assert {s.step for s in tracer.samples()} == {0}


@pytest.mark.parametrize("profiled", [False, True])
def test_a_copy_of_a_traced_model_is_another_model(profiled: bool) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 8)
    context = moe_trace.profile(model) if profiled else moe_trace.MoETracer(model)
    with torch.no_grad(), context as running:
        tracer = running.tracer if profiled else running
        model(**batch)
        copied = copy.deepcopy(model)  # as averaged weights are made in the middle of training
        expected = model(**batch).logits
        assert torch.equal(copied(**batch).logits, expected)
    assert [s.step for s in tracer.samples() if s.layer == 0] == ([0, 0] if profiled else [0, 1])
    with moe_trace.MoETracer(copied) as own:
        copied(**batch)
    assert {s.call for s in own.samples()} == {0}
    assert len(tracer.samples()) == 2 * len(tracer.sites)


def test_a_shallow_copy_shares_what_is_traced() -> None:
    """Its hooks are the original's own: taking them off the copy would end the recording."""
    model, batch = tiny_olmoe(), token_batch(2, 8)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        model(**batch)
        copy.copy(model)(**batch)
        copy.copy(model.model.layers[0].mlp)(torch.randn(1, 4, 32))
        model(**batch)
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(8) for c in calls]


def test_calls_outside_any_forward_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submodule called on its own: no end of a forward reduces what waits."""
    monkeypatch.setattr("moe_trace.record.calls.recorder._PENDING_CALLS_MAX", 20)
    model = tiny_olmoe(layers=1)
    hidden = torch.randn(1, 2, 32)
    with torch.no_grad(), moe_trace.MoETracer(model, capacity=50) as tracer:
        for _ in range(100):
            model.model.layers[0].mlp(hidden)
            assert tracer._recorder._pending.calls <= 20
    assert len(tracer.samples()) == 50
    assert tracer.recording().lost.overwritten == 50


def test_a_traced_model_can_be_saved_whole(tmp_path: Path) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 8)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        expected = model(**batch).logits
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(**batch).logits, expected)
    assert len(tracer.samples()) == len(tracer.sites)


PLAIN = 10
"""Forwards after which a router is known to hand out other memory each time, and has the plainest hooks."""


def our_ranges(trace: Path) -> list[tuple[str, float, float]]:
    """(name, start, end) of each range of the first layer, in order of their starts."""
    events = json.loads(trace.read_bytes())["traceEvents"]
    found = [e for e in events if e.get("cat") == "user_annotation" and e["name"].endswith("/L00")]
    return sorted(((e["name"], e["ts"], e["ts"] + e["dur"]) for e in found), key=lambda one: one[1])


def test_ranges_of_a_block_that_calls_itself_are_nested(tmp_path: Path) -> None:
    """In tiles of its tokens; and each range is over when its module has returned."""
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp

    def tiled(hidden: torch.Tensor) -> Any:
        if hidden.shape[1] > 6:
            parts = [block(part.contiguous()) for part in hidden.split(6, dim=1)]
            torch.ones(1) + 1  # an operator behind them, inside the outer block
            return torch.cat(parts, dim=1)
        return type(block).forward(block, hidden)

    block.forward = tiled
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        for _ in range(PLAIN):
            model(**token_batch())
        with torch.profiler.profile(activities=CPU) as prof:
            model(**token_batch())
    prof.export_chrome_trace(str(path := tmp_path / "trace.json"))
    ranges = our_ranges(path)
    names = [name.split("/")[0] for name, *_ in ranges]
    assert names == ["moe.block", *["moe.block", "moe.router", "moe.experts"] * 2]
    outer, first, router, experts, second, *_ = ranges
    assert outer[1] <= first[1] <= router[1] <= router[2] <= experts[1] <= experts[2] <= first[2]
    assert first[2] <= second[1] <= ranges[-1][2] <= second[2] < outer[2]
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(8) for c in calls]


def test_a_range_that_an_interruption_left_ends_with_its_forward(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1)
    with torch.no_grad(), moe_trace.MoETracer(model):
        for _ in range(PLAIN):
            model(**token_batch())
        with torch.profiler.profile(activities=CPU) as prof:
            model(**token_batch())
            model.model.layers[0].mlp.experts.forward = _raiser(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**token_batch())
            del model.model.layers[0].mlp.experts.forward
            model(**token_batch())
    prof.export_chrome_trace(str(path := tmp_path / "trace.json"))
    ranges = our_ranges(path)
    assert [name.split("/")[0] for name, *_ in ranges] == ["moe.block", "moe.router", "moe.experts"] * 3
    assert ranges[4][2] <= ranges[6][1] and ranges[5][2] <= ranges[6][1]
