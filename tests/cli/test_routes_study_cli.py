"""`moe-trace routes study` and `cache`: the output agrees with the analyses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_trace.cli import main
from moe_trace.read.routes.cache.simulate import expert_bytes_of, simulate
from moe_trace.read.routes.study import study
from tiny_routes import random_routes


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two domains, with weights and token ids."""
    paths = []
    for number in range(2):
        random = np.random.default_rng(number)
        weights = np.sort(random.random((60, 4, 2)), axis=2)[:, :, ::-1].astype(np.float16)
        token_ids = random.integers(0, 3, 60).astype(np.int32)
        routes = random_routes(60, seed=number, weights=weights, token_ids=token_ids)
        paths.append(str(routes.save(tmp_path / f"{number}.routes.npz")))
    return paths


def printed(capsys: Any, *arguments: str, code: int = 0) -> str:
    assert main(["routes", *arguments]) == code
    out, err = capsys.readouterr()
    return str(out if code == 0 else err)


def read(path: str) -> Any:
    from moe_trace.data.routes.reader import read_routes

    return read_routes(path)


def test_json_says_what_study_found(files: list[str], capsys: Any) -> None:
    plain = json.loads(printed(capsys, "study", *files, "--labels", "code,prose", "--json", "--matrices"))
    found = study([read(path) for path in files], ["code", "prose"])
    assert plain["labels"] == ["code", "prose"] and plain["rows"] == 120
    for one, layer in zip(plain["layers"], found.layers, strict=True):
        assert one["coactivation"]["together"] == layer.coactivation.together.tolist()
        assert one["transition"] is None or one["transition"]["recall"] == layer.transition.recall
        known = ~np.isnan(layer.locality.lags)
        assert [x for x in one["locality"]["lags"] if x is not None] == layer.locality.lags[known].tolist()
        assert one["domains"]["share"] == layer.domains.share.tolist()
        assert one["vocabulary"]["input"]["mean"] == layer.vocabulary["input"].mean
        assert one["gates"]["mass_share"] == layer.gates.mass_share.tolist()
        assert one["distinct"]["expected"] == layer.distinct.expected.tolist()
        assert one["load"]["cv"] == layer.load.cv
    small = json.loads(printed(capsys, "study", files[0], "--json"))
    assert "together" not in small["layers"][0]["coactivation"] and small["layers"][0]["domains"] is None


def test_text_has_a_table_for_each_analysis(files: list[str], capsys: Any) -> None:
    text = printed(capsys, "study", *files)
    begins = ("Routes of", "Load", "Reuse within", "How well", "Co-activation, all", "Distinct", "Domains")
    for begin in (*begins, "Vocabulary", "Gating weights"):
        assert sum(line.startswith(begin) for line in text.splitlines()) == 1, begin
    layer = study([read(path) for path in files]).layers[0]
    reuse = text.split("Reuse within")[1].split("\nL00")[1].split("%")[0]
    assert float(reuse) == round(100 * layer.locality.consecutive, 1)
    assert "unknown" in text, "the margin to the first expert that was not chosen"
    assert max(map(len, text.splitlines())) <= 100


def test_checkpoints_are_told_from_domains(files: list[str], tmp_path: Path, capsys: Any) -> None:
    routes = read(files[0])
    early = random_routes(60, seed=5, token_ids=routes.token_ids)
    first = str(early.save(tmp_path / "early.routes.npz"))
    text = printed(capsys, "study", first, files[0], "--labels", "early,late")
    assert "the same tokens" in text and "Saturation" in text and "Domains" not in text
    share = study([early, routes]).saturation.top_k[0, 0]
    line = next(x for x in text.split("Saturation")[1].splitlines() if x.startswith("L00"))
    assert line.split()[1] == f"{100 * share:.1f}"


def test_what_was_not_recorded_is_said_to_be_unknown(tmp_path: Path, capsys: Any) -> None:
    unknown = np.full(30, -1, np.int32)
    path = random_routes(30, sequence=unknown, position=unknown).save(tmp_path / "a.routes.npz")
    text = printed(capsys, "study", str(path))
    assert "Sequence or position of 30 tokens is unknown" in text and "Reuse within" not in text
    assert "Token ids were not recorded" in text and "Gating weights were not recorded" in text


def test_a_file_without_tokens_has_nothing_to_study(tmp_path: Path, capsys: Any) -> None:
    path = random_routes(0).save(tmp_path / "a.routes.npz")
    assert "0 tokens" in printed(capsys, "study", str(path))
    assert "0 steps" in printed(capsys, "cache", str(path), "--experts-in-memory", "2")


def test_cache_prints_what_was_simulated(tmp_path: Path, capsys: Any) -> None:
    routes = random_routes(50, forward=np.arange(50))
    path = str(routes.save(tmp_path / "a.routes.npz"))
    options = ("--experts-in-memory", "3,8", "--prefetch", "transition", "--expert-bytes", "1000")
    found = simulate(routes, [3, 8], prefetch_by="transition", expert_bytes=1000)
    plain = json.loads(printed(capsys, "cache", path, *options, "--json"))
    rates = {(r["policy"], r["experts_in_memory"]): r["hit_rate"] for r in plain["results"]}
    assert rates == {(r.policy, r.experts_in_memory): r.hit_rate for r in found.results}
    text = printed(capsys, "cache", path, *options, "--layers")
    for result in found.results:
        begin = [result.policy, str(result.experts_in_memory)]
        line = next(x.split() for x in text.splitlines() if x.split()[:2] == begin)
        assert line[2] == f"{100 * result.hit_rate:.1f}"
        assert float(line[4]) == round(result.loads_per_token, 2)
    assert "Prefetching by transition" in text and "Hit rate by layer" in text
    short = printed(capsys, "cache", path, *options[:2], "--steps", "10")
    assert "the first 10 of 50 steps (20.0 %)" in " ".join(short.split()) and "Bytes are unknown" in short


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "{f}", "--labels", "a,b"], "expected 1 names"),
        (["cache", "{f}", "--experts-in-memory", "no"], "expected whole numbers from 1 on"),
        (["cache", "{f}", "--experts-in-memory", "0"], "expected whole numbers from 1 on"),
        (["cache", "{f}", "--experts-in-memory", "2", "--policy", "fifo"], "expected one of lru, lfu"),
        (["cache", "{f}", "--experts-in-memory", "2", "--policy", ","], "expected one of lru, lfu"),
        (["cache", "{f}", "--experts-in-memory", "2", "--steps", "-1"], "from 0 on"),
        (["study", "{f}", "{g}"], "has other layers"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    one = random_routes(10)
    paths = {"f": one.save(tmp_path / "f.routes.npz")}
    paths["g"] = replace(one, layers=("a", "b", "c", "d")).save(tmp_path / "g.routes.npz")
    given = [argument.format(**paths) for argument in arguments]
    assert said in printed(capsys, *given, code=2)


def test_bytes_come_from_the_shape_that_the_model_was_recorded_with(tmp_path: Path, capsys: Any) -> None:
    config = {"hidden_size": 2048, "intermediate_size": 1024}
    model = {"dtype": "bfloat16", "config": config}
    path = str(random_routes(9, model=model).save(tmp_path / "a.routes.npz"))
    text = printed(capsys, "cache", path, "--experts-in-memory", "2")
    assert "One expert's weights: 12.6 MB" in text, "OLMoE-1B-7B: 3 x 2048 x 1024 numbers of 2 bytes"
    assert (
        json.loads(printed(capsys, "cache", path, "--experts-in-memory", "2", "--json"))["expert_bytes"]
        == 12_582_912
    )
    for unknown in ({**model, "dtype": "uint4"}, {"config": config}, {"dtype": "bfloat16"}):
        assert expert_bytes_of(unknown) is None
    assert expert_bytes_of({**model, "config": {**config, "quantization_config.bits": 4}}) is None
    assert expert_bytes_of({**model, "dtype": "float8_e4m3fn"}) is None
    assert expert_bytes_of({**model, "config": {**config, "moe_intermediate_size": 10}}) == 3 * 2048 * 10 * 2


def test_predicted_ids_are_studied_as_the_others_are(files: list[str], tmp_path: Path, capsys: Any) -> None:
    ids = np.random.default_rng(5).integers(-1, 4, 60)
    np.save(tmp_path / "predicted.npy", ids)
    plain = json.loads(
        printed(capsys, "study", files[0], "--predicted", str(tmp_path / "predicted.npy"), "--json")
    )
    found = study([read(files[0])], predicted=[ids]).layers
    means = [one["vocabulary"]["predicted"]["mean"] for one in plain["layers"]]
    assert means == [layer.vocabulary["predicted"].mean for layer in found]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(60), r"expected whole numbers, one for each row; found float64 \(60,\)"),
        (np.zeros((60, 2), int), r"found int64 \(60, 2\)"),
        (np.zeros(59, int), "expected one predicted token id for each row"),
        (np.array([{}]), "no .npy array of predicted token ids"),
    ],
)
def test_predicted_ids_of_another_form_are_refused(
    files: list[str], tmp_path: Path, capsys: Any, array: np.ndarray, said: str
) -> None:
    np.save(tmp_path / "predicted.npy", array, allow_pickle=True)
    text = printed(capsys, "study", files[0], "--predicted", str(tmp_path / "predicted.npy"), code=2)
    assert re.search(said, text) and text.count("\n") == 1
