"""Tests of pages of tokens and of the study's figures, against the routes."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_trace import RecordedRoutes
from moe_trace.data.routes.reader import save_routes
from moe_trace.read.routes.cache import simulate
from moe_trace.read.routes.study import study
from moe_trace.read.routes.text.texts import find_texts
from moe_trace.read.routes.text.tokenizer import byt5
from moe_trace.show.figures.figure import Figure
from moe_trace.show.figures.routes.curves import study_figures
from moe_trace.show.figures.routes.matrices import CELLS_MAX
from moe_trace.show.figures.routes.report import cache_curve, routes_figures
from moe_trace.show.routes import tokens as pages_module
from moe_trace.show.routes.tokens import PADDING, TokenPages
from moe_trace.show.routes_page import render_routes_page
from moe_trace.show.tensorboard.catalog import Catalogs
from moe_trace.show.tensorboard.data import Dashboard
from paths import DATA


def make(
    tokens: int = 600, layers: int = 3, slots: int = 2, experts: int = 8, **changes: Any
) -> RecordedRoutes:
    rng = np.random.default_rng(7)
    order = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :slots]
    columns: dict[str, Any] = {
        "expert_ids": order.astype(np.uint8 if experts <= 255 else np.uint16),
        "layers": tuple(f"model.layers.{i}.mlp.gate" for i in range(layers)),
        "num_experts": (experts,) * layers,
        "top_k": (slots,) * layers,
        "padding": rng.random(tokens) < 0.1,
        "step": np.arange(tokens) // 200,
        "forward": np.arange(tokens) // 200,
        "sequence": (np.arange(tokens) // 100 % 2).astype(np.int32),
        "position": (np.arange(tokens) % 100).astype(np.int32),
        "stage_codes": np.full(tokens, 2, np.uint8),
        "weights": rng.random(order.shape).astype(np.float16),
        "token_ids": rng.integers(3, 120, tokens).astype(np.int32),
    }
    return RecordedRoutes(**{**columns, **changes})


def unpack(page: dict[str, Any]) -> dict[str, np.ndarray]:
    content, at, found = gzip.decompress(base64.b64decode(page["data"])), 0, {}
    for name, kind, size in page["columns"]:
        found[name] = np.frombuffer(content, np.dtype(kind).newbyteorder("<"), size, at)
        at += found[name].nbytes
    assert at == len(content)
    return found


@pytest.mark.parametrize("experts", [8, 300])
def test_pages_hold_every_token_once_and_unchanged(monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    monkeypatch.setattr(pages_module, "TOKENS_MAX", 70)
    routes = make(experts=experts)
    pages = TokenPages(routes, byt5())
    found = [pages.page(i) for i in range(len(pages))]
    assert max(page["tokens"] for page in found) <= 70
    rows = find_texts(routes).rows
    columns = [unpack(page) for page in found]
    for name in ("expert_ids", "weights", "token_ids", "position", "step", "stage_codes"):
        joined = np.concatenate([column[name] for column in columns])
        expected = getattr(routes, name)[rows].ravel()
        np.testing.assert_array_equal(joined.view(expected.dtype) if name == "weights" else joined, expected)
    flags = np.concatenate([column["flags"] for column in columns])
    np.testing.assert_array_equal(flags == PADDING, routes.padding[rows])
    assert [sum(size for _, size in page["texts"]) for page in found] == [page["tokens"] for page in found]
    shown = find_texts(routes).rows[: found[0]["tokens"]]
    assert set(found[0]["words"].items()) == {
        (str(i), chr(i - 3))
        for i in routes.token_ids[shown].tolist()  # type: ignore[index]
    }


def test_the_header_counts_what_is_no_padding() -> None:
    routes = make()
    header = TokenPages(routes).header()
    for layer in range(3):
        kept = routes.expert_ids[~routes.padding, layer].ravel().tolist()
        assert header["assignments"][layer] == [kept.count(e) for e in range(8)]
    assert header["layers"] == ["L00", "L01", "L02"]
    assert sum(TokenPages(routes).page(i)["tokens"] for i in range(len(header["pages"]))) == len(routes)


def test_no_text_without_recorded_ids_or_without_a_tokenizer() -> None:
    routes = make()
    assert TokenPages(replace(routes, token_ids=None), byt5()).page(0)["words"] == {}
    without = TokenPages(replace(routes, token_ids=None), byt5())
    assert not without.header()["has_text"]
    assert "token_ids" not in unpack(without.page(0))
    assert TokenPages(routes).page(0)["words"] == {}
    assert not TokenPages(routes).header()["has_text"]


@pytest.mark.parametrize("index", [-1, 1000])
def test_there_is_no_other_page(index: int) -> None:
    with pytest.raises(KeyError):
        TokenPages(make()).page(index)


def test_no_tokens_make_a_page_too() -> None:
    page = render_routes_page(make(tokens=0), label="empty")
    assert '"tokens":0' in page.replace(" ", "")


def test_a_large_page_of_a_large_model_stays_below_two_megabytes() -> None:
    """61 layers of top 8 of 256, with weights, as DeepSeek-V3's."""
    pages = TokenPages(make(tokens=3000, layers=61, slots=8, experts=256), byt5())
    assert len(json.dumps(pages.page(0))) < 2_000_000


def test_names_and_text_cannot_end_the_script() -> None:
    evil = "</script><img src=x onerror=alert(1)>\u2028"
    routes = replace(make(tokens=40, layers=1), layers=(evil,), model={"name": evil}, dropped={evil: 3})
    page = render_routes_page(
        routes, label=evil, vocabulary=byt5(), figures=[routes_figures([routes], [evil])]
    )
    assert "<img" not in page.lower().split("<script>")[0]
    assert page.count("</script") == 4, "plotly, figures, routes, ours"
    assert "\u2028" not in page.split('id="routes">')[1].split("</script>")[0]


# -- figures --------------------------------------------------------------------------------------------


def by_key(found: Any) -> dict[str, Figure]:
    return {figure.key: figure for figure in study_figures(found)}


def test_heat_maps_show_what_the_study_found() -> None:
    routes = make()
    found = study([routes], ["a"])
    figures = by_key(found)
    kept = routes.expert_ids[~routes.padding]
    for layer, frame in enumerate(figures["coactivation"].frames):
        (trace,) = frame.traces
        for i, j in ((0, 1), (5, 2)):
            with_i = [set(row) for row in kept[:, layer].tolist() if i in row]
            expected = sum(j in row for row in with_i) / len(with_i)
            assert trace["z"][i][j] == pytest.approx(expected, abs=6e-4)
    first = figures["transition"].frames[0]
    assert first.label == "L00 to L01"
    with_3 = [
        set(after) for here, after in zip(kept[:, 0].tolist(), kept[:, 1].tolist(), strict=True) if 3 in here
    ]
    assert first.traces[0]["z"][3][4] == pytest.approx(
        sum(4 in row for row in with_3) / len(with_3), abs=6e-4
    )


def test_many_experts_are_drawn_by_their_most_used() -> None:
    found = study([make(tokens=300, layers=30, slots=4, experts=128)], ["a"])
    figure = by_key(found)["coactivation"]
    cells = sum(len(trace["z"]) * len(trace["z"][0]) for frame in figure.frames for trace in frame.traces)
    assert cells <= CELLS_MAX
    drawn = [int(name[1:]) for name in figure.frames[3].traces[0]["x"]]
    counts = found.layers[3].counts
    assert counts[drawn].min() >= np.delete(counts, drawn).max()
    assert "most used" in figure.caption


def test_domains_and_saturation_come_from_several_files() -> None:
    routes = make()
    found = by_key(study([routes[:300], routes[300:]], ["docs", "<b>code</b>"]))
    bars = found["domains"].data
    assert [bar["name"] for bar in bars] == ["docs", "&lt;b&gt;code&lt;/b&gt;", "k / E"]
    docs = routes[:300]
    kept = docs.expert_ids[~docs.padding, 0].tolist()
    assert bars[0]["y"][2] == pytest.approx(sum(2 in row for row in kept) / len(kept), abs=1e-4)
    assert set(bars[2]["y"]) == {0.25}
    assert "saturation" not in found

    earlier = replace(routes, expert_ids=(routes.expert_ids + 1) % 8)
    saturated = by_key(study([earlier, routes], ["step 1", "step 2"]))["saturation"]
    shared = [
        len(set(a) & set(b)) / 2
        for a, b, pad in zip(
            earlier.expert_ids[:, 0].tolist(), routes.expert_ids[:, 0].tolist(), routes.padding, strict=True
        )
        if not pad
    ]
    assert saturated.data[0]["y"] == [pytest.approx(np.mean(shared), abs=1e-4), 1.0]


def test_reuse_and_distinct_experts() -> None:
    routes = make()
    found = by_key(study([routes], ["a"]))
    assert [one["name"] for one in found["reuse"].data] == ["token before", "k / E", "chance by load"]
    assert set(found["reuse"].data[1]["y"]) == {0.25}
    line = found["distinct"].data[2]
    assert line["y"][0] == pytest.approx(2.0)
    assert line["y"] == sorted(line["y"])


def test_the_cache_s_curves_and_its_limit() -> None:
    routes = make()
    found = simulate(routes, [2, 4], together="token")
    figure = cache_curve(found)
    assert [trace["name"] for trace in figure.data] == ["LRU", "LFU", "static", "Belady, the limit"]
    lru, limit = figure.data[0], figure.data[-1]
    assert lru["x"] == list(range(1, 9))
    assert limit["x"] == [2, 4]
    for size, best in zip(limit["x"], limit["y"], strict=True):
        assert all(trace["y"][size - 1] <= best for trace in figure.data[:-1])
    assert [row[0] for row in figure.rows] == ["LRU", "LFU", "static", "Belady"]
    # LRU of two experts, by hand: what the token before had.
    kept = routes[~routes.padding]
    hits = sum(
        len(set(a) & set(b))
        for layer in range(3)
        for a, b in zip(
            kept.expert_ids[:-1, layer].tolist(), kept.expert_ids[1:, layer].tolist(), strict=True
        )
    )
    assert lru["y"][1] == pytest.approx(hits / (len(kept) * 3 * 2), abs=1e-4)


# -- the tab --------------------------------------------------------------------------------------------

TRACE = "train_grouped_mm.pt.trace.json.gz"


def test_the_tab_answers_from_the_file_beside_the_trace(tmp_path: Path) -> None:
    shutil.copy(DATA / "h200" / TRACE, tmp_path)
    asked = {"run": ".", "trace": TRACE}
    routes = make()
    dashboard = Dashboard(Catalogs(str(tmp_path)))
    assert dashboard.answer("routes", asked) == {"missing": True}
    assert dashboard.answer("trace", asked)["routes"] is False
    file = tmp_path / "train_grouped_mm.routes.npz"
    save_routes(replace(routes, others=(make(tokens=50, layers=1),)), file)
    assert dashboard.answer("trace", asked)["routes"] is True
    answer = dashboard.answer("routes", asked)
    assert answer["header"] == TokenPages(routes).header()
    assert len(answer["groups"]) == 2
    assert dashboard.answer("routes_page", asked) == TokenPages(routes).page(0)
    assert dashboard.answer("routes_page", {**asked, "group": "1"})["tokens"] == 50
    keys = [figure["key"] for figure in dashboard.answer("routes_study", asked)["figures"]]
    assert keys == ["coactivation", "transition", "reuse", "distinct", "cache"]
    for wrong in ({"page": "99"}, {"group": "2"}, {"page": "-1"}):
        with pytest.raises(KeyError):
            dashboard.answer("routes_page", {**asked, **wrong})

    file.unlink()
    file = tmp_path / "train_grouped_mm.pt.trace.routes.npz"  # as the recorder names it
    save_routes(make(tokens=70), file)
    assert dashboard.answer("routes", asked)["header"]["tokens"] == 70
    file.write_bytes(b"no routes")
    assert "broken" in dashboard.answer("routes", asked)


def test_the_tab_compares_the_files_of_a_run(tmp_path: Path) -> None:
    """Of the same tokens as checkpoints, of other tokens as domains; another rank's are not compared."""
    routes = make()
    last = replace(routes, expert_ids=(routes.expert_ids + 1) % 8)
    asked = {"run": ".", "trace": "b.pt.trace.json.gz"}
    for name, part in (("a", routes), ("b", last), ("other", replace(last, rank=1))):
        shutil.copy(DATA / "h200" / TRACE, tmp_path / f"{name}.pt.trace.json.gz")
        save_routes(part, tmp_path / f"{name}.routes.npz")
    (saturation,) = Dashboard(Catalogs(str(tmp_path))).answer("routes_study", asked)["compared"]
    assert saturation["key"] == "saturation"
    assert saturation["data"][0]["x"] == ["a", "b"]
    save_routes(routes[:300], tmp_path / "a.routes.npz")
    (domains,) = Dashboard(Catalogs(str(tmp_path))).answer("routes_study", asked)["compared"]
    assert [trace["name"] for trace in domains["data"]] == ["a", "b", "k / E"]
    (tmp_path / "a.routes.npz").unlink()
    assert Dashboard(Catalogs(str(tmp_path))).answer("routes_study", asked)["compared"] == []


def test_a_link_out_of_the_log_folder_is_not_followed(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    shutil.copy(DATA / "h200" / TRACE, logs)
    save_routes(make(), tmp_path / "outside.npz")
    (logs / "train_grouped_mm.routes.npz").symlink_to(tmp_path / "outside.npz")
    assert Dashboard(Catalogs(str(logs))).answer("routes", {"run": ".", "trace": TRACE}) == {"missing": True}
