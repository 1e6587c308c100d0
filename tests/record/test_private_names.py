"""Each private name of torch is taken away in turn: recording goes on, or says what it cannot do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from paths import ROOT

CHILD = """
import json, sys, warnings
sys.path.insert(0, {tests!r})
import torch, torch._dynamo, torch._subclasses.fake_tensor, torch.utils._python_dispatch
import torch.cuda._graph_annotations
from models import tiny_olmoe, token_batch, watch_experts  # transformers has its own uses of torch's names


class Without:  # an object of torch's C code, whose attributes cannot be deleted
    def __init__(self, inner, name):
        self.inner, self.name = inner, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.inner, name)


def take_away(path):
    owner, _, name = path.rpartition(".")
    parts, holder = owner.split("."), torch
    for part in parts[:-1]:
        holder = getattr(holder, part)
    inner = getattr(holder, parts[-1])
    try:
        kept = inner, name, getattr(inner, name)
        delattr(inner, name)
    except (AttributeError, TypeError):
        kept = holder, parts[-1], inner
        setattr(holder, parts[-1], Without(inner, name))
    return kept


def record(names):
    for module in [name for name in sys.modules if name.split(".")[0] == "moe_trace"]:
        del sys.modules[module]
    torch._dynamo.reset()
    taken = [take_away(name) for name in names]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import moe_trace
        import moe_trace.record.profiler
        for owner, name, value in reversed(taken):  # torch itself needs them
            setattr(owner, name, value)
        model = tiny_olmoe()
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
# The names, and what is then lost: nothing where a public way stands behind it.
NAMES: dict[str, str] = {
    "_C._current_graph_task_id": "calls that gradient checkpointing repeats",
    "autograd.Variable._execution_engine": "",
    "_C._autograd._profiler_enabled": "",
    "autograd.profiler._is_profiler_enabled": "",
    "_C._profiler._ExperimentalConfig": "",
    "_C._autograd._record_function_with_args_enter": "",
    "_C._autograd._record_function_with_args_exit": "",
    "_C._dynamo.eval_frame": "",
    "_dynamo.mark_static_address": "",
    "_subclasses.fake_tensor.unset_fake_temporarily": "",
    "cuda._graph_annotations.mark_kernels": "",
    "cuda._graph_annotations.get_kernel_annotations": "",
    "_C._cuda_getCurrentRawStream": "",
}
FAKES = ("_subclasses.fake_tensor.unset_fake_temporarily", "utils._python_dispatch._disable_current_modes")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, Any]]:
    """What was recorded, by the names that were missing; in one process, which is new."""
    trace = tmp_path_factory.mktemp("private") / "trace.json"
    names = [*((name,) for name in NAMES), FAKES]
    code = CHILD.format(tests=str(ROOT / "tests"), names=names, trace=str(trace))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_recording_goes_on_without_it(without: dict[tuple[str, ...], dict[str, Any]], name: str) -> None:
    found, loss = without[name,], NAMES[name]
    assert found["counts"]
    assert found["placed"] == 3
    assert found["trained"] == 6
    assert found["compiled"] == 3
    assert len(found["said"]) == (1 if loss else 0)
    assert all(loss in text for text in found["said"])
    assert found["phases"] == (["forward"] if loss else ["forward", "recompute"])


def test_compiled_code_is_left_alone_where_rings_cannot_be_made(
    without: dict[tuple[str, ...], dict[str, Any]],
) -> None:
    found = without[FAKES]
    assert found["counts"]
    assert found["compiled"] == 0
    assert "what is decided inside compiled code is not recorded" in found["said"][0]


def test_private_names_stand_in_one_file() -> None:
    """An attribute below torch with an underscore; dunder names are public."""
    package = ROOT / "moe_trace"
    found = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path.name != "torch_names.py"
        for name in private_names(path.read_text("utf-8"))
    }
    assert found == set()


def private_names(source: str) -> set[str]:
    """`torch.…._x` and `from torch.… import _x` in the source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith("torch.") and node.attr.startswith("_") and not node.attr.startswith("__"):
                found.add(dotted)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names):
                found.add(f"{node.module}: {names[-1]}")
    return found


def test_a_private_name_is_found() -> None:
    assert private_names("import torch\nx = torch._C._f(1)") == {"torch._C", "torch._C._f"}
    assert private_names("from torch._C import _f") == {"torch._C: _f"}
    assert private_names("import torch\ntorch.compiler.reset(); torch.__version__") == set()
