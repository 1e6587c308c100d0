"""Tests of `moe-trace view`, the picture for the image dashboard, and the wheel that contains the tab."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from moe_trace.cli import main
from moe_trace.cli.view import choose_port, is_free, require_traces
from moe_trace.data.display.load_picture import CELL_PX, DIVERGING, GAP_PX, colours, load_picture
from moe_trace.data.errors import UsageError
from paths import ROOT

H200 = ROOT / "tests" / "data" / "h200"


# -- the command ---------------------------------------------------------------------------------------


def test_view_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, words in (
        (tmp_path / "none", "does not exist"),
        (file, "is no trace"),
        (tmp_path, "found no run"),
    ):
        assert main(["view", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_view_says_that_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert not is_free(port)
        assert main(["view", str(H200), "--port", str(port)]) == 2
        assert f"port {port} is taken" in capsys.readouterr().err
    with pytest.raises(UsageError, match="1 to 65535"):
        choose_port(70000)


def test_view_says_that_tensorboard_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a)
    )
    assert main(["view", str(H200)]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_view_finds_traces_in_folders_below() -> None:
    assert len(require_traces(H200.parent).traces) == len(list(H200.parent.rglob("*.pt.trace.json.gz")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["", "train_grouped_mm.pt.trace.json.gz"])
def test_view_starts_tensorboard_and_ends_it(tmp_path: Path, number: signal.Signals, name: str) -> None:
    with running_view(tmp_path / "log", H200 / name, *(["--tab"] if name else [])) as (process, port, log):
        wait_for(lambda: f"http://localhost:{port}/#moe" in log.read_text(), log)
        assert (f"&p.moe.run=.&p.moe.trace={name}" in log.read_text()) == bool(name)
        with urlopen(f"http://127.0.0.1:{port}/data/plugin/moe/runs", timeout=30) as answer:
            assert b"train_grouped_mm" in answer.read()
        process.send_signal(number)
        assert process.wait(30) == (0 if number is signal.SIGINT else 128 + number)
    assert is_free(port), "TensorBoard has ended too"


@contextmanager
def running_view(log: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "moe_trace", "view", *map(str, arguments), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process, port, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_single_trace_is_served_with_its_viewer_and_nothing_else(tmp_path: Path) -> None:
    trace = H200 / "train_grouped_mm.pt.trace.json.gz"
    with running_view(tmp_path / "log", trace) as (process, port, log):
        wait_for(lambda: f"http://localhost:{port}/?trace={trace.name}" in log.read_text(), log)

        def ask(path: str, host: str = "localhost") -> tuple[int, bytes, str | None]:
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path, headers={"Host": f"{host}:{port}"})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Content-Encoding")

        assert ask("/trace.json") == (200, trace.read_bytes(), "gzip")
        for page in ("/?trace=x", "/trace_viewer_full.html", "/webcomponents.min.js"):
            assert ask(page)[0] == 200 and ask(page)[2] is None, page
        for evil in ("/../setup.cfg", "/index.html", "//etc/passwd", "/trace.json/"):
            assert ask(evil)[0] == 404, evil
        assert ask("/trace.json", "evil.example")[0] == 404, "a name that was made to point here"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_without_torch_tb_profiler_a_single_trace_opens_in_the_tab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "torch_tb" in name else find(name, *a)
    )
    trace = tmp_path / "a.json"
    trace.write_text('{"traceEvents": []}')
    (tmp_path / "b.pt.trace.json").write_text('{"traceEvents": []}')
    assert main(["view", str(trace)]) == 2
    assert "rename it" in capsys.readouterr().err


def wait_for(true: object, log: Path, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


# -- the wheel -----------------------------------------------------------------------------------------


def test_the_wheel_carries_the_tab(tmp_path: Path) -> None:
    """Built from a copy, installed into a fresh environment, served from there."""
    source = tmp_path / "source"
    source.mkdir()
    names = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "moe_trace"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    static = ROOT / "moe_trace" / "show" / "tensorboard" / "static"
    wanted = {p.relative_to(ROOT).as_posix() for p in static.rglob("*") if p.is_file()}
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    zipfile.ZipFile(wheel).extractall(site)  # what pip does with a pure wheel; the venv has no pip
    # The other packages are lent by the environment of the tests, after those of the fresh one.
    lent = next(p for p in sys.path if p.endswith("site-packages") and (Path(p) / "tensorboard").is_dir())
    script = f"""
import sys
sys.path.append({lent!r})
from importlib.metadata import entry_points
point = next(e for e in entry_points(group="tensorboard_plugins") if e.name == "moe")
plugin_class = point.load()
import moe_trace
assert moe_trace.__file__.startswith({str(home)!r}), moe_trace.__file__
from types import SimpleNamespace
from werkzeug.test import Client
apps = plugin_class(SimpleNamespace(logdir={str(H200)!r})).get_plugin_apps()
for name in {sorted(p.relative_to(static).as_posix() for p in static.rglob("*") if p.is_file())!r}:
    answer = Client(apps["/static/*"]).get("/static/" + name)
    assert answer.status_code == 200 and answer.data, name
assert Client(apps["/runs"]).get("/runs").json["runs"]
"""
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# -- the picture ---------------------------------------------------------------------------------------


def test_the_picture_shows_each_load_in_its_colour() -> None:
    picture = load_picture([[2, 1, 1, 0], [8, 0]])
    step = CELL_PX + GAP_PX
    at = lambda row, column: picture[row * step + 3, column * step + 3].tolist()  # noqa: E731
    rgb = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DIVERGING]
    assert at(0, 1) == rgb[2], "an equal share is pale"
    assert at(0, 3) == at(1, 1) == rgb[0], "unused is dark blue"
    assert at(1, 0) == colours(np.array([2.0]))[0].tolist()
    assert at(1, 2) == [255, 255, 255], "the second layer has two experts"
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 4 * step


def test_the_handler_writes_pictures_and_no_more_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from moe_trace.integrations.scalars import IMAGE_TAG, scalar_points, write_scalars
    from moe_trace.read.reader import read_summary

    samples = read_summary(H200 / "prefill_grouped_mm.pt.trace.json.gz").samples
    write_scalars(tmp_path, samples)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [IMAGE_TAG]
    assert [image.step for image in events.Images(IMAGE_TAG)] == sorted({s.step for s in samples})
    assert set(events.Tags()["scalars"]) == {tag for tag, _, _ in scalar_points(samples)}
