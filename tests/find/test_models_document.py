"""Tests that docs/models.md agrees with the installed transformers and this moe_trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paths import ROOT

REPOSITORY = ROOT
sys.path.insert(0, str(REPOSITORY / "scripts"))

import list_models  # noqa: E402


def test_the_committed_file_is_up_to_date() -> None:
    text = list_models.DOCUMENT.read_text(encoding="utf-8")
    if f"transformers {list_models.transformers.__version__}:" not in text:
        pytest.skip("generated from another transformers")
    assert list_models.main(["--check"]) == 0, "run python scripts/list_models.py"


def test_a_stale_file_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(list_models, "document", lambda: "new text\n")
    monkeypatch.setattr(list_models, "DOCUMENT", tmp_path / "models.md")
    assert list_models.main(["--check"]) == 1
    assert "is out of date: run python scripts/list_models.py" in capsys.readouterr().err
    assert list_models.main([]) == 0
    assert list_models.main(["--check"]) == 0


def test_the_comparison_is_that_of_the_released_models() -> None:
    found = {
        folder: list_models.default_router(folder, class_name)
        for folder, (class_name, _) in list_models.COMPARED.items()
    }
    sizes = {folder: (info.num_experts, info.top_k) for folder, (info, _) in found.items()}
    assert sizes["olmoe"] == (64, 8)
    assert sizes["mixtral"] == (8, 2)
    assert sizes["qwen3_moe"] == (128, 8)
    assert sizes["deepseek_v3"] == (256, 8)
    assert sizes["gpt_oss"] == (128, 4)
    assert sizes["dbrx"] == (16, 4)
    assert {folder for folder, (_, where) in found.items() if where == "block"} == {"dbrx"}
    # OLMoE-1B-7B: 3 matrices of 1024 x 2048 for each of 64 experts.
    assert found["olmoe"][0].parameters["experts"] == 64 * 3 * 1024 * 2048
    assert found["olmoe"][0].shared_flops_per_token == 0 < found["deepseek_v3"][0].shared_flops_per_token
