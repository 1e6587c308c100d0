"""Tests without optional packages: a feature that needs one says what to install, and all others work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT
from tiny_trace import write_tiny

OPTIONAL = ("plotly", "pyarrow", "pandas", "perfetto", "accelerate")
BLOCK = """
import importlib.abc, sys

class Gone(importlib.abc.MetaPathFinder):  # as where they were never installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {gone!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
known = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {gone!r} else known(name, *rest)
sys.meta_path.insert(0, Gone())
"""


def run(body: str, gone: tuple[str, ...] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = BLOCK.format(gone=gone) + body
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def command(*words: object) -> str:
    return f"from moe_trace.cli import main\nsys.exit(main({[str(word) for word in words]!r}))"


WORKS = {
    "import": "import moe_trace; [getattr(moe_trace, name) for name in moe_trace.__all__]",
    "record": """
import torch, moe_trace
from moe_trace.demo import load_demo_model
model, tokenizer = load_demo_model()
with torch.no_grad(), moe_trace.profile(model, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
    model(**tokenizer("Which experts?", return_tensors="pt"))
prof.export_chrome_trace({out!r})
assert moe_trace.read_summary({out!r}).totals.calls == 4
""",
    "report": command("report", "{trace}"),
    "ask": command("ask", "{trace}"),
    "diff": command("diff", "{trace}", "{trace}"),
    "check": command("check", "{trace}"),
    "csv": command("export", "{trace}", "--to", "csv", "--out", "{out}"),
    "tab": """
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client
from moe_trace.show.tensorboard.plugin import MoEPlugin
apps = MoEPlugin(TBContext(logdir={folder!r})).get_plugin_apps()
(run,) = Client(apps["/runs"]).get("/").json["runs"]
where = {{"run": run["run"], "trace": run["traces"][0]["trace"]}}
for view in ("overview", "routing", "time"):
    answer = Client(apps["/" + view]).get("/", query_string=where)
    assert answer.status_code == 200 and "error" not in answer.json, answer.text
said = Client(apps["/plotly.min.js"]).get("/")
assert said.status_code == 404 and "pip install 'moe_trace[report]'" in said.json["error"], said.text
""",
}
SAYS = {
    "html": (command("report", "{trace}", "--html", "{out}"), "plotly", "'moe_trace[report]'"),
    "parquet": (
        command("export", "{trace}", "--to", "parquet", "--out", "{out}"),
        "pyarrow",
        "'moe_trace[export]'",
    ),
    "perfetto": (
        command("export", "{trace}", "--to", "perfetto", "--out", "{out}"),
        "perfetto",
        "'moe_trace[export]'",
    ),
    "split": (
        command("run", "--model", "demo", "--fsdp", "2", "--out", "{out}"),
        "accelerate",
        "'moe_trace[parallel]'",
    ),
    "data frame": (
        """
import moe_trace
from moe_trace.data.errors import MissingPackage
try:
    moe_trace.read_summary({trace!r}).to_dataframe()
except ImportError as error:
    assert isinstance(error, MissingPackage)
    print(error, file=sys.stderr)
    sys.exit(2)
""",
        "pandas",
        "pandas",
    ),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    trace = write_tiny(tmp_path / "a.pt.trace.json")
    (tmp_path / "out").mkdir()
    return {"trace": str(trace), "folder": str(tmp_path), "out": str(tmp_path / "out" / "made")}


@pytest.mark.parametrize("what", WORKS)
def test_it_works_without(places: dict[str, str], what: str) -> None:
    done = run(WORKS[what].format(**places))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("what", SAYS)
def test_what_needs_it_says_in_one_line_what_to_install(places: dict[str, str], what: str) -> None:
    body, package, install = SAYS[what]
    done = run(body.format(**places))
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if "pip install" in line]
    assert package in line and line.endswith(f"pip install {install}")
    assert "Traceback" not in done.stderr
    assert not Path(places["out"]).exists()


def test_a_package_that_is_not_optional_is_missed() -> None:
    """The block works: without msgspec there is no reading."""
    assert run("import moe_trace.read.reader", gone=("msgspec",)).returncode == 1
