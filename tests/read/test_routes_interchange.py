"""Tests of reading and writing routes of other tools, and of refusals in one line."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import RecordedRoutes, read_routes
from moe_trace.cli import main
from moe_trace.data.errors import MoETraceError, TraceFileError, UsageError
from moe_trace.read.routes.interchange.files import FORMATS, export_routes, import_routes
from tiny_routes import random_routes

KEPT = ("layers", "num_experts", "top_k", "rank", "world_size", "dropped")


def full(seed: int = 0, experts: int = 16) -> RecordedRoutes:
    """Every column there is, some slots skipped."""
    routes = random_routes(30, experts=min(experts, 200), seed=seed)
    rng = np.random.default_rng(seed)
    routes.expert_ids[rng.random(routes.expert_ids.shape) < 0.1] = routes.no_expert
    return replace(
        routes,
        padding=rng.random(30) < 0.2,
        step=np.arange(30) // 10,
        forward=np.arange(30) // 5,
        stage_codes=(np.arange(30) % 3).astype(np.uint8),
        recomputed=rng.random(30) < 0.3,
        weights=rng.random(routes.expert_ids.shape).astype(np.float16),
        token_ids=rng.integers(0, 1 << 20, 30).astype(np.int32),
        model={"name": "demo"},
        dropped={"over max_mib": 3},
    )


@pytest.mark.parametrize("form", ["parquet", "arrow", "safetensors"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_exported_with_all_columns_comes_back(form: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow" if form != "safetensors" else "safetensors")
    routes = full(seed)
    target = tmp_path / f"routes{FORMATS[form]}"
    assert export_routes(routes, target, form) == []
    found, notes = import_routes(target)
    assert notes == []
    assert found.columns().keys() == routes.columns().keys()
    for name, column in routes.columns().items():
        assert found.columns()[name].dtype == column.dtype
        np.testing.assert_array_equal(found.columns()[name], column, err_msg=name)
    assert {name: getattr(found, name) for name in KEPT} == {name: getattr(routes, name) for name in KEPT}


@pytest.mark.parametrize("form", ["npy", "npz", "megatron"])
def test_ids_and_fills_come_back_from_the_plain_forms(form: str, tmp_path: Path) -> None:
    routes = replace(full(), layers=tuple(f"decoder.layers.{i}.mlp.router" for i in range(4)))
    target = tmp_path / f"routes{FORMATS[form]}"
    export_routes(routes, target, form)
    found, notes = import_routes(target, num_experts=16)
    np.testing.assert_array_equal(found.expert_ids, routes.expert_ids)
    assert any("read as no expert" in note for note in notes)
    if form == "megatron":
        assert found.layers == routes.layers
        np.testing.assert_array_equal(found.step, routes.step)
        np.testing.assert_array_equal(found.forward, routes.forward)


def test_groups_that_are_left_out_are_said(tmp_path: Path) -> None:
    routes = replace(full(), others=(random_routes(3),))
    assert "4 layers of 1 other groups" in export_routes(routes, tmp_path / "a.npy", "npy")[0]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["uint8", "int8", "int16", "uint16", "int32", "int64"]),
    experts=st.sampled_from([4, 100, 255, 256, 300]),
    told=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_integer_array_is_read_id_by_id(
    kind: str, experts: int, told: bool, seed: int, tmp_path_factory: Any
) -> None:
    rng = np.random.default_rng(seed)
    experts = min(experts, np.iinfo(kind).max + 1)
    ids = rng.integers(0, experts, (9, 3, 2)).astype(kind)
    if kind.startswith("int"):
        ids[rng.random(ids.shape) < 0.2] = -1
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, ids)
    found, notes = import_routes(path, num_experts=experts if told else None)
    for place in np.ndindex(ids.shape):
        value = int(ids[place])
        none = value < 0 or (kind == "uint8" and value == 255 and not (told and experts == 256))
        assert int(found.expert_ids[place]) == (found.no_expert if none else value)
        assert none or found.num_experts[0] > value
    assert found.model == {"captured_by": "an array"} and found.sequence.tolist() == [-1] * 9
    assert any("--num-experts" in note for note in notes) is not told


def test_rows_of_fill_are_padding(tmp_path: Path) -> None:
    ids = np.array([[[0, 1]], [[2, 3]], [[255, 255]]], np.uint8)
    np.save(tmp_path / "ids.npy", ids)
    found, notes = import_routes(tmp_path / "ids.npy")
    assert found.padding.tolist() == [False, False, True] and "1 tokens have nothing else" in notes[0]


def test_a_batch_of_a_trainer_is_taken_apart_by_its_mask(tmp_path: Path) -> None:
    """As verl has it: [batch, tokens, layers, top_k], left padded, zeros where there is nothing."""
    ids = np.random.default_rng(0).integers(0, 8, (2, 5, 3, 2)).astype(np.int32)
    mask = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    ids[mask == 0] = 0
    tokens = np.arange(10).reshape(2, 5)
    np.savez(tmp_path / "batch.npz", routed_experts=ids, attention_mask=mask, input_ids=tokens)
    found, _ = import_routes(tmp_path / "batch.npz", num_experts=8)
    assert found.padding.tolist() == (mask.ravel() == 0).tolist()
    assert found.sequence.tolist() == [0] * 5 + [1] * 5
    assert found.position.tolist() == [-1, -1, 0, 1, 2, -1, 0, 1, 2, 3]
    assert found.token_ids is not None and found.token_ids.tolist() == list(range(10))
    np.testing.assert_array_equal(found.expert_ids, ids.reshape(10, 3, 2))


def in_form(ids: np.ndarray, form: str) -> Any:
    if form == "lists":
        return ids.tolist()
    if form == "base64":
        data = base64.b64encode(ids.astype("<i2").tobytes()).decode()
        return {"encoding": "base64", "dtype": "int16", "shape": list(ids.shape), "data": data}
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


@pytest.mark.parametrize("form", ["lists", "base64"])
def test_a_response_of_vllm_has_prompt_and_generated_tokens(form: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 8, (12, 3, 2))
    response = {
        "choices": [
            {"text": "a", "routed_experts": in_form(ids[5:8], form)},
            {"text": "b", "routed_experts": in_form(ids[8:], form)},
        ],
        "prompt_routed_experts": in_form(ids[:5], form),
    }
    (tmp_path / "r.json").write_text(json.dumps(response))
    found, _ = import_routes(tmp_path / "r.json", num_experts=8)
    np.testing.assert_array_equal(found.expert_ids, np.concatenate([ids[:8], ids[:5], ids[8:]]))
    assert found.sequence.tolist() == [0] * 8 + [1] * 9
    assert found.position.tolist() == [*range(8), *range(9)]
    assert found.stage.tolist() == ["prefill"] * 5 + ["decode"] * 3 + ["prefill"] * 5 + ["decode"] * 4
    assert found.model["captured_by"] == "vLLM"


@pytest.mark.parametrize("wrapped", ["meta_info", "sgl_ext"])
def test_flat_ids_of_sglang_need_layers_and_top_k(wrapped: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 8, (7, 3, 2))
    inner = {wrapped: {"routed_experts": in_form(ids, "flat")}}
    responses = [inner if wrapped == "meta_info" else {"choices": [inner]}] * 2
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses))
    with pytest.raises(UsageError, match="--layers"):
        import_routes(tmp_path / "r.jsonl")
    with pytest.raises(TraceFileError):
        import_routes(tmp_path / "r.jsonl", layers=5, top_k=2)
    found, _ = import_routes(tmp_path / "r.jsonl", layers=3, top_k=2)
    np.testing.assert_array_equal(found.expert_ids, np.concatenate([ids, ids]))
    assert found.sequence.tolist() == [0] * 7 + [1] * 7 and found.model["captured_by"] == "SGLang"


def test_a_router_trace_of_megatron_has_steps_microbatches_and_mtp(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines, truth = [], []
    for step in (3, 4):
        for _ in range(2):  # microbatches
            ids = rng.integers(0, 8, (5, 3, 2))
            truth.append(ids)
            for layer in range(3):
                record = {"step": step, "stage": "pre_dispatch", "rank": 1, "num_tokens": 5, "topk": 2}
                record |= {"block": "decoder", "layer": layer + 1} if layer < 2 else {}
                record |= {"block": "mtp", "mtp_idx": 0, "layer": 1} if layer == 2 else {}
                lines.append({**record, "top_indices": ids[:, layer].tolist()})
    path = tmp_path / "router_trace_rank1.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = import_routes(path, num_experts=8)
    np.testing.assert_array_equal(found.expert_ids, np.concatenate(truth))
    assert found.layers == (
        "decoder.layers.1.mlp.router",
        "decoder.layers.2.mlp.router",
        "mtp.layers.0.mtp_model_layer.layers.1.mlp.router",
    )
    assert found.step.tolist() == [3] * 10 + [4] * 10 and found.rank == 1
    assert found.forward.tolist() == [n for n in range(4) for _ in range(5)]


def bad_files(folder: Path) -> dict[str, Path]:
    def text(name: str, content: str) -> Path:
        (folder / name).write_text(content)
        return folder / name

    def saved(name: str, array: np.ndarray) -> Path:
        np.save(folder / name, array, allow_pickle=True)
        return folder / name

    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 16, 8)}"
    )
    (folder / "huge.npy").write_bytes(header.ljust(128) + bytes(64))
    np.savez(folder / "names.npz", a=np.zeros((2, 2, 2), int), b=np.zeros((2, 2, 2), int))
    np.savez(folder / "mask.npz", routed_experts=np.zeros((2, 3, 1, 1), int), attention_mask=np.ones((2, 2)))
    np.savez_compressed(folder / "bomb.npz", routed_experts=np.zeros((1 << 21, 1, 1), np.int64))
    return {
        "a folder": folder,
        "no file": folder / "none.npy",
        "another ending": text("a.txt", "0"),
        "floats": saved("floats.npy", np.zeros((2, 2, 2))),
        "two axes": saved("flat.npy", np.zeros((2, 2), int)),
        "objects": saved("objects.npy", np.array([[[print]]], object)),
        "ids of 2**32": saved("wide.npy", np.full((2, 2, 2), 1 << 32)),
        "a huge header": folder / "huge.npy",
        "no npy": text("text.npy", "hello"),
        "no npz": text("text.npz", "hello"),
        "other names": folder / "names.npz",
        "another mask": folder / "mask.npz",
        "a bomb": folder / "bomb.npz",
        "no json": text("a.json", "{"),
        "deep json": text("deep.json", "[" * 100_000),
        "no experts": text("b.json", '{"choices": [{"text": "x"}]}'),
        "ragged": text("c.json", '{"choices": [{"routed_experts": [[[1, 2], [3]]]}]}'),
        "no base64": text("d.json", '{"meta_info": {"routed_experts": "%%%"}}'),
        "a bad line": text("e.jsonl", '{"step": 0, "layer": 1, "top_indices": [[1]]}\n{"step": 0}\n'),
        "tokens differ": text(
            "f.jsonl",
            '{"step": 0, "layer": 1, "top_indices": [[1]]}\n'
            '{"step": 0, "layer": 2, "top_indices": [[1], [2]]}\n',
        ),
        "no parquet": text("a.parquet", "hello"),
        "no arrow": text("a.arrow", "hello"),
        "no safetensors": text("a.safetensors", "hello"),
    }


CASES = [
    "a folder", "no file", "another ending", "floats", "two axes", "objects", "ids of 2**32", "a huge header",
    "no npy", "no npz", "other names", "another mask", "a bomb", "no json", "deep json", "no experts",
    "ragged", "no base64", "a bad line", "tokens differ", "no parquet", "no arrow", "no safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: Any) -> dict[str, Path]:
    files = bad_files(tmp_path_factory.mktemp("bad"))
    assert list(files) == CASES
    return files


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_capture_is_refused_in_one_line(
    case: str, bad: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_trace.read.routes.interchange.files._FREE_BYTES", 1 << 22)
    if case in ("no parquet", "no arrow"):
        pytest.importorskip("pyarrow")
    if case == "no safetensors":
        pytest.importorskip("safetensors")
    with pytest.raises(MoETraceError) as error:
        import_routes(bad[case])
    message = str(error.value)
    assert "\n" not in message and "expected" in message and len(message) < 500


def test_the_commands_import_export_and_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = random_routes(50, experts=16).expert_ids
    np.save("routed_experts.npy", ids.astype(np.int16))
    assert main(["routes", "import", "routed_experts.npy", "--num-experts", "16", "-o", "a.routes.npz"]) == 0
    assert "50 x 4 x 2 ids" in capsys.readouterr().out
    np.testing.assert_array_equal(read_routes("a.routes.npz").expert_ids, ids)
    assert main(["routes", "import", "routed_experts.npy", "-o", "a.routes.npz"]) == 6
    assert main(["routes", "check", "a.routes.npz"]) == 0
    assert main(["routes", "check", "routed_experts.npy"]) == 0
    assert "--num-experts" in capsys.readouterr().err
    assert main(["routes", "diff", "a.routes.npz", "routed_experts.npy"]) == (2 if ids.max() < 15 else 0)
    assert main(["routes", "export", "a.routes.npz", "--to", "npy"]) == 0
    np.testing.assert_array_equal(np.load("a.npy"), ids)
    assert main(["routes", "export", "a.routes.npz", "--to", "npy"]) == 6
    assert main(["routes", "import", "none.npy", "-o", "b.routes.npz"]) == 5
    assert not Path("b.routes.npz").exists()
