"""Tests with each private name of torch removed in turn: recording continues, or says what it cannot do."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from moe_trace import MoETracer
from moe_trace.find.private import torch_names
from paths import ROOT

pytestmark = pytest.mark.timeout(600)  # some seconds a name, where nothing else runs

CHILD = """
import json, pkgutil, sys, types, warnings
sys.path.insert(0, {tests!r})
import torch, torch._dynamo, torch._subclasses.fake_tensor, torch.cuda._graph_annotations
from models import tiny_olmoe, token_batch, watch_experts

HIDDEN = {{}}  # name: its module. moe_trace does not find it; torch has uses of its own for it


class Module(types.ModuleType):
    def __getattribute__(self, name):
        if name in HIDDEN and sys._getframe(1).f_globals.get("__name__", "").startswith("moe_trace"):
            raise AttributeError(name)
        return super().__getattribute__(name)


class Engine:  # the engine of autograd, an object of C code
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if name == "queue_callback" and asks.startswith("moe_trace"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def hide(names):
    for module in HIDDEN.values():
        module.__class__ = types.ModuleType
    HIDDEN.clear()
    for name in names:
        holder, _, last = name.rpartition(".")
        module = pkgutil.resolve_name("torch." + holder)
        if isinstance(module, types.ModuleType):
            module.__class__ = Module
            HIDDEN[last] = module
            continue
        assert last == "queue_callback", name
        torch.autograd.Variable._execution_engine = Engine(module)


def record(names):
    for module in [name for name in sys.modules if name.split(".")[0] == "moe_trace"]:
        del sys.modules[module]
    torch._dynamo.reset()
    hide(names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import moe_trace
        model = tiny_olmoe(layers=1)
        batch = token_batch(2, 6)
        with torch.no_grad(), watch_experts(model) as calls, moe_trace.profile(model) as prof:
            model(**batch)
        prof.export_chrome_trace({trace!r})
        samples = prof.tracer.samples()
        model.train()
        model.gradient_checkpointing_enable()
        with moe_trace.MoETracer(model) as tracer:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        trained = tracer.samples()
        model.eval()
        with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
            torch.compile(model, backend="eager")(**batch, use_cache=False)
        return {{
            "counts": [s.assignments.tolist() for s in samples] == [c.assignments(8) for c in calls],
            "placed": sum(s.placement is not None for s in samples),
            "phases": sorted({{s.phase for s in trained}}),
            "trained": len(trained),
            "compiled": len(tracer.samples()),
            "said": [str(w.message) for w in caught if " has no " in str(w.message)],
        }}


print(json.dumps([record(names) for names in {names!r}]))
"""
NAMES_FILE = ROOT / "moe_trace" / "find" / "private" / "torch_names.py"
LOST = {
    "_C._current_graph_task_id": "calls that gradient checkpointing repeats are counted",
}
"""What is lost without a name, if anything: a public way stands behind the others."""
TOGETHER = {
    ("_subclasses.fake_tensor.unset_fake_temporarily", "utils._python_dispatch._disable_current_modes"): (
        "what is decided inside compiled code is not recorded"
    ),
    (
        "_C._autograd._profiler_enabled",
        "autograd._profiler_enabled",
        "autograd.profiler._is_profiler_enabled",
    ): "no call has a place in a trace",
}
"""Names that stand behind one another, and what is lost without all of them."""


def names_in(source: str) -> list[str]:
    """What is looked up below torch: `_named("a._b")`, and `getattr(torch.a, "_b")`."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        words = [word.value for word in node.args if isinstance(word, ast.Constant)]
        if ast.unparse(node.func) == "_named":
            found[words[0]] = None
        elif ast.unparse(node.func) in ("getattr", "hasattr"):
            holder = ast.unparse(node.args[0]).replace("_profiler", "torch.autograd.profiler")
            if holder.startswith("torch."):
                found[f"{holder.removeprefix('torch.')}.{words[0]}"] = None
    return list(found)


NAMES = names_in(NAMES_FILE.read_text("utf-8"))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, Any]]:
    """What was recorded, by the names that were missing; in one process, which is new."""
    trace = tmp_path_factory.mktemp("private") / "trace.json"
    names = [*((name,) for name in NAMES), *TOGETHER]
    code = CHILD.format(tests=str(ROOT / "tests"), names=names, trace=str(trace))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_recording_goes_on_without_it(without: dict[tuple[str, ...], dict[str, Any]], name: str) -> None:
    found, loss = without[name,], LOST.get(name)
    assert found["counts"]
    assert found["placed"] == 1
    assert found["trained"] == 2
    assert found["compiled"] == 1
    assert len(found["said"]) == (1 if loss else 0)
    assert all(loss in text for text in found["said"])
    assert found["phases"] == (["forward"] if loss else ["forward", "recompute"])


@pytest.mark.parametrize("names", TOGETHER)
def test_what_cannot_be_done_is_said(
    without: dict[tuple[str, ...], dict[str, Any]], names: tuple[str, ...]
) -> None:
    found = without[names]
    assert found["counts"] and found["trained"] == 2
    (said,) = [text for text in found["said"] if text.startswith("torch ")]
    assert TOGETHER[names] in said
    assert [found["compiled"], found["placed"]].count(0) == 1


def test_hooks_of_modules_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module._forward_hooks`, without which torch itself does not run."""
    from models import tiny_olmoe, token_batch

    monkeypatch.setattr(torch_names, "_HOOKS", "_renamed")
    model = tiny_olmoe(layers=1)
    with MoETracer(copy.copy(model)) as tracer:
        model(**token_batch(2, 6))
        model.register_forward_hook(lambda *_: None)
        model(**token_batch(2, 6))
    assert len(tracer.samples()) == 2


def test_private_names_stand_in_one_folder() -> None:
    """An attribute below torch with an underscore; dunder names are public."""
    package = ROOT / "moe_trace"
    found = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path.parent.name != "private"
        for name in private_names(path.read_text("utf-8"))
    }
    assert found == set()


HOOKS = re.compile(r"_(forward|backward|state_dict|load_state_dict)_(pre_)?hooks\w*")


def private_names(source: str) -> set[str]:
    """`torch.…._x`, `from torch.… import _x` and `module._forward_hooks` in the source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and (dotted.startswith("torch.") or HOOKS.fullmatch(node.attr)):
                found.add(dotted)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names):
                found.add(f"{node.module}: {names[-1]}")
    return found


def test_a_private_name_is_found() -> None:
    assert private_names("import torch\nx = torch._C._f(1)") == {"torch._C", "torch._C._f"}
    assert private_names("from torch._C import _f") == {"torch._C: _f"}
    assert private_names("module._forward_pre_hooks") == {"module._forward_pre_hooks"}
    assert private_names("import torch\ntorch.compiler.reset(); torch.__version__") == set()
