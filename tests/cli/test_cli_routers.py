"""Tests of `moe-trace routers`: its output for any model, at 80 columns, without running the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from families.configs import BY_NAME, FAMILIES
from families.dense import DENSE
from families.family import Family
from moe_trace.cli import main
from moe_trace.find.routers import find_routers
from moe_trace.show.routers import compact_path, group_routers, render_routers, runs

NO_AUTO_CLASS = {"qwen3_omni_moe/talker": "AutoConfig does not know the type of a talker on its own"}
LISTABLE = [f for f in FAMILIES if f.name not in NO_AUTO_CLASS and "no-router" not in f.traits]


def config_file(family: Family, folder: Path) -> Path:
    """The family's config as a user has it, without the name of a class."""
    config = family.config
    config.architectures = None
    path = folder / "config.json"
    path.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", LISTABLE, ids=lambda family: family.name)
def test_any_config_is_listed(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(family, tmp_path)
    assert main(["routers", str(path)]) == 0
    text = capsys.readouterr().out
    assert main(["routers", str(path), "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)["routers"]
    expected = {site.info.router_class for site in find_routers(family.build())}
    assert {router["router_class"] for router in listed} == expected
    assert {router["contract"] for router in listed} == {family.contract}
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\x1b", text)
    flat = re.sub(r"\s+", " ", text)
    for router in listed:
        assert router["router_class"] in flat
        assert all(note in flat for note in router["notes"])


def listing(name: str) -> str:
    model = BY_NAME[name].build()
    routers = [site.info for site in find_routers(model)]
    return render_routers(type(model).__name__, routers, {"topk-experts": "how they speak"})


def test_equal_routers_share_two_lines() -> None:
    lines = listing("mixtral/text").splitlines()
    assert lines[0] == "MixtralForCausalLM: 3 routers"
    assert lines[3].split() == ["A", "0-2", "8", "2", "parameters", "512", "147", "k", "-"]
    assert lines[4].split() == ["FLOP/token", "1.02", "k", "73.7", "k", "-"]
    assert lines[5].split() == ["all", "parameters", "1.54", "k", "442", "k", "-"]
    assert "model.layers.{0-2}.mlp.gate" in lines[8]
    assert lines[-1] == "   topk-experts: how they speak"


def test_layers_that_differ_stand_apart() -> None:
    text = listing("hunyuan_v1_moe/per_layer")
    ks = [line.split()[3] for line in text.splitlines() if re.match(r"[ABC]\s+\d", line)]
    assert ks == ["1", "2", "3"]


def test_shared_experts_of_two_routers_are_counted_once() -> None:
    model = BY_NAME["ernie4_5_vl_moe/mixed"].build()
    routers = [site.info for site in find_routers(model)]
    shared = model.get_submodule("layers.1.mlp.shared_experts")
    count = sum(parameter.numel() for parameter in shared.parameters())
    assert sum(r.parameters["shared"] for r in routers if r.layer == 1) == count
    assert len(group_routers(routers)) == 2


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([0, 1, 2], "0-2"),
        ([0, 1, 2, 5, 7, 8], "0-2,5,7-8"),
        ([1, 3, 5, 7], "1-7 step 2"),
        ([1, 3], "1,3"),
        ([2, 1, 1], "1-2"),
    ],
)
def test_runs(numbers: list[int], text: str) -> None:
    assert runs(numbers) == text


def test_paths_are_folded_where_one_number_differs() -> None:
    assert compact_path(["m.layers.0.gate"]) == "m.layers.0.gate"
    assert compact_path(["m.layers.0.gate", "m.layers.1.gate"]) == "m.layers.{0-1}.gate"
    assert compact_path(["a.0.layer.1.gate", "a.2.layer.1.gate"]) == "a.{0,2}.layer.1.gate"
    assert compact_path(["a.0.1.gate", "a.2.3.gate"]) == "a.0.1.gate … a.2.3.gate"
    assert compact_path(["l.0.w2v.gate", "l.1.w2v.gate"]) == "l.{0-1}.w2v.gate"


@pytest.mark.parametrize("name", ["llama/dense", "gemma3n/router", "d_fine/gate"])
def test_a_model_without_routers_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (family,) = [family for family in DENSE if family.name == name]
    assert main(["routers", str(config_file(family, tmp_path))]) == 3
    out: Any = capsys.readouterr()
    assert out.out == ""
    assert "found 0 routers in" in out.err
    assert "in a dense model there is nothing to trace" in out.err
