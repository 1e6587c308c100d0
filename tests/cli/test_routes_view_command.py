"""Tests of `moe-trace routes view`, except for the look of its page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_trace import RecordedRoutes
from moe_trace.cli import main
from moe_trace.data.routes.reader import read_routes, save_routes
from paths import DATA
from tiny_routes import routes_of

WORDS = ("sesame", "</script>")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tokens = 60
    ids = np.arange(tokens * 2).reshape(tokens, 1, 2) % 4
    routes = routes_of(ids, 4, token_ids=np.arange(tokens, dtype=np.int32) % 2)
    path = tmp_path / "trace.routes.npz"
    save_routes(routes, path)
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    return path


def test_the_page_stands_beside_the_file_and_replaces_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = file.with_name("trace.html")
    assert main(["routes", "view", str(file)]) == 0
    first = page.read_text(encoding="utf-8")
    assert "sesame" not in first, "no text without a tokenizer"
    assert f"wrote {page}" in capsys.readouterr().err
    assert main(["routes", "view", str(file)]) != 0
    assert "exists" in capsys.readouterr().err
    assert main(["routes", "view", str(file), "-f", "--tokenizer", str(file.parent / "vocab.json")]) == 0
    second = page.read_text(encoding="utf-8")
    assert "sesame" in second
    assert second.count("</script") == first.count("</script")


def test_its_input_is_never_replaced(file: Path) -> None:
    before = file.read_bytes()
    assert main(["routes", "view", str(file), "-f", "-o", str(file)]) != 0
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no routes"])
def test_what_is_no_file_of_routes_gets_a_line(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.routes.npz").write_bytes(content)
    assert main(["routes", "view", str(tmp_path / "a.routes.npz")]) != 0
    error = capsys.readouterr().err
    assert error.startswith("moe-trace: error: ") and error.count("\n") == 1
    assert not (tmp_path / "a.html").exists()


def test_files_of_other_layers_are_not_studied_together(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.routes.npz"
    save_routes(RecordedRoutes(**{**_columns(file), "layers": ("layers.7.gate",)}), other)
    assert main(["routes", "view", str(file), str(other)]) != 0
    assert "other layers" in capsys.readouterr().err


def test_a_report_s_page_has_the_routes_beside_the_trace(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.pt.trace.json.gz"
    shutil.copy(DATA / "h200" / "train_grouped_mm.pt.trace.json.gz", trace)
    page = tmp_path / "report.html"
    assert main(["report", str(trace), "--html", str(page)]) == 0
    assert 'id="f0-tokens0"' in page.read_text(encoding="utf-8")
    assert 'id="f0-routes0-coactivation"' in page.read_text(encoding="utf-8")
    file.write_bytes(b"no routes")
    capsys.readouterr()
    assert main(["report", str(trace), "--html", str(page), "-f"]) == 0
    assert "left out of the page" in capsys.readouterr().err
    assert 'id="f0-tokens0"' not in page.read_text(encoding="utf-8")


def _columns(file: Path) -> dict[str, object]:
    routes = read_routes(file)
    kept = ("num_experts", "top_k")
    return {**routes.columns(), **{name: getattr(routes, name) for name in kept}}
