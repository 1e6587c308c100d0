"""Tests of where routes are written: next to a trace, which names the file, or to a file during the run."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace import Routes
from moe_trace.cli import main
from moe_trace.data.codec import decode_recording, encode_recording


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_names_the_file_of_routes_beside_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 6)
    with moe_trace.profile(model, routes=True) as prof, torch.no_grad():
        model(**batch)
    prof.export_chrome_trace(str(tmp_path / name))
    recording = moe_trace.read_recording(tmp_path / name)
    assert recording.routes == "trace.routes.npz"
    read = moe_trace.read_routes(tmp_path / recording.routes)
    assert (read.expert_ids == prof.tracer.routes().expert_ids).all() and len(read) == 12
    assert main(["report", str(tmp_path / name)]) == 0
    assert "trace.routes.npz" in capsys.readouterr().out


def test_a_trace_without_routes_names_none_and_old_recordings_are_read(tmp_path: Path) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 6)
    with moe_trace.profile(model) as prof, torch.no_grad():
        model(**batch)
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    assert moe_trace.read_recording(tmp_path / "trace.json").routes is None
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_rows_are_streamed_to_a_file_which_is_whole_once_recording_ends(tmp_path: Path) -> None:
    model, path = tiny_olmoe(), tmp_path / "run.routes.npz"
    batches = [token_batch(8, 128, seed=seed) for seed in range(30)]
    kept = moe_trace.MoETracer(model, routes=True)
    with moe_trace.MoETracer(model, routes=Routes(path=path)) as tracer, kept, torch.no_grad():
        for batch in batches[:29]:
            model(**batch, use_cache=False)
        assert len(tracer.routes()) == 29 * 1024
        assert tracer._recorder.routes._blocks.nbytes == 0  # what stands in the file takes no memory
        model(**batches[29], use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = moe_trace.read_routes(path)
    expected = kept.routes()
    assert (read.expert_ids == expected.expert_ids).all() and read.dropped == {}
    for column in ("step", "forward", "sequence", "position", "padding", "stage_codes"):
        assert (getattr(read, column) == getattr(expected, column)).all()
    with tracer, torch.no_grad():  # goes on after it was closed
        model(**batches[0], use_cache=False)
    again = moe_trace.read_routes(path)
    assert len(again) == 31 * 1024 and (again[: len(read)].expert_ids == read.expert_ids).all()
    assert (again.expert_ids[-1024:] == read.expert_ids[:1024]).all()


def test_a_disk_that_fails_costs_routes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_trace.data.errors import OutputError
    from moe_trace.data.routes.reader import RoutesWriter

    def full(self: RoutesWriter, part: object) -> None:
        raise OutputError("disk full")

    model = tiny_olmoe()
    monkeypatch.setattr(RoutesWriter, "append", full)
    with pytest.warns(RuntimeWarning, match="disk full"):
        tracer = moe_trace.MoETracer(model, routes=Routes(path=tmp_path / "a.routes.npz"))
        with tracer, torch.no_grad():
            model(**token_batch(2, 6))
            assert tracer.routes().dropped == {"not written": 12}
    assert len(tracer.samples()) == 3


def test_the_simple_profiler_and_run_take_the_same_argument(tmp_path: Path) -> None:
    model, batch = tiny_olmoe(), token_batch(2, 6)
    profiler = moe_trace.MoEProfiler(model, routes=Routes(every=2))
    profiler.start()
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
    profiler.stop()
    assert profiler.tracer.routes().step.tolist() == [0] * 12 + [2] * 12
    out, file = tmp_path / "run", tmp_path / "mine.routes.npz"
    arguments = ["run", "--steps", "2", "--seq-len", "16", "--batch", "1"]
    assert main([*arguments, "--out", str(out), "--routes"]) == 0
    (beside,) = out.glob("*.routes.npz")
    assert main([*arguments, "--out", str(tmp_path / "two"), "--routes", str(file)]) == 0
    assert np.array_equal(moe_trace.read_routes(beside).expert_ids, moe_trace.read_routes(file).expert_ids)
    assert len(moe_trace.read_routes(file)) == 2 * 16
    with pytest.raises(SystemExit):
        main([*arguments, "--routes", "train.py"])


def test_the_recordings_codec_keeps_the_name() -> None:
    model = tiny_olmoe()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        model(**token_batch(1, 4))
    from dataclasses import replace

    import msgspec

    recording = replace(tracer.recording(), routes="a.routes.npz")
    assert decode_recording(msgspec.json.decode(encode_recording(recording))).routes == "a.routes.npz"
