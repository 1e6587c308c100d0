"""Tests of turning rows in call order into texts in reading order, and token ids into text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import RecordedRoutes
from moe_trace.data.calls.sample import STAGES
from moe_trace.data.errors import UsageError
from moe_trace.read.routes.text.texts import find_texts
from moe_trace.read.routes.text.tokenizer import byt5, read_vocabulary

PAD = -1
Row = tuple[int, int, int, str]
"""Forward, sequence, position (`PAD`: padding), stage."""


def routes_of(rows: list[Row], **changes: Any) -> RecordedRoutes:
    tokens = len(rows)
    columns: dict[str, Any] = {
        "expert_ids": np.zeros((tokens, 1, 1), np.uint8),
        "layers": ("layers.0.gate",),
        "num_experts": (2,),
        "top_k": (1,),
        "padding": np.array([row[2] == PAD for row in rows], bool),
        "step": np.zeros(tokens, np.int64),
        "forward": np.array([row[0] for row in rows], np.int64),
        "sequence": np.array([row[1] for row in rows], np.int32),
        "position": np.array([row[2] for row in rows], np.int32),
        "stage_codes": np.array([STAGES.index(row[3]) for row in rows], np.uint8),
    }
    return RecordedRoutes(**{**columns, **changes})


def read(routes: RecordedRoutes) -> list[list[int]]:
    """Row numbers of each text."""
    found = find_texts(routes)
    return [found.rows[text.first : text.first + text.tokens].tolist() for text in found.texts]


def test_generation_reads_on_through_its_forwards() -> None:
    """Two sequences, the second padded on the left, prefilled and then decoded a token at a time."""
    rows: list[Row] = [(0, 0, p, "prefill") for p in (0, 1, 2)]
    rows += [(0, 1, p, "prefill") for p in (PAD, 0, 1)]
    rows += [(1, 0, 3, "decode"), (1, 1, 2, "decode"), (2, 0, 4, "decode"), (2, 1, 3, "decode")]
    routes = routes_of(rows)
    assert read(routes) == [[0, 1, 2, 6, 8], [3, 4, 5, 7, 9]]
    labels = [text.label for text in find_texts(routes).texts]
    assert labels == ["step 0, sequence 0, prefill and decode", "step 0, sequence 1, prefill and decode"]


def test_training_begins_anew_with_each_batch() -> None:
    rows: list[Row] = [(f, s, p, "train") for f in (0, 1) for s in (0, 1) for p in (0, 1)]
    assert read(routes_of(rows)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_tokens_that_speculation_ran_twice_stay_with_their_text() -> None:
    rows: list[Row] = [(0, 0, 0, "prefill"), (0, 0, 1, "prefill"), (1, 0, 2, "decode"), (1, 0, 3, "decode")]
    rows += [(2, 0, 3, "decode"), (2, 0, 4, "decode")]  # position 3 was rejected
    assert read(routes_of(rows)) == [[0, 1, 2, 3, 4, 5]]


def test_another_prompt_in_the_same_row_is_another_text() -> None:
    rows: list[Row] = [(0, 0, 0, "prefill"), (1, 0, 1, "decode"), (2, 0, 0, "prefill"), (3, 0, 1, "decode")]
    assert read(routes_of(rows)) == [[0, 1], [2, 3]]


def test_recomputed_tokens_are_texts_of_their_own() -> None:
    rows: list[Row] = [(0, 0, 0, "train"), (0, 0, 1, "train")] * 2
    again = np.array([False, False, True, True])
    found = find_texts(routes_of(rows, recomputed=again))
    assert [(text.tokens, "recomputed" in text.label) for text in found.texts] == [(2, False), (2, True)]


def test_an_unknown_sequence_reads_a_forward_at_a_time() -> None:
    rows: list[Row] = [(0, -1, 0, "train"), (0, -1, 1, "train"), (1, -1, 2, "train")]
    found = find_texts(routes_of(rows))
    assert [text.tokens for text in found.texts] == [2, 1]
    assert all("sequence unknown" in text.label for text in found.texts)


def test_no_tokens_are_no_texts() -> None:
    assert find_texts(routes_of([])).texts == ()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(-1, 2), st.integers(-1, 5), st.sampled_from(STAGES)),
        max_size=40,
    )
)
def test_every_row_stands_in_exactly_one_text(rows: list[Row]) -> None:
    rows.sort(key=lambda row: row[0])
    found = read(routes_of(rows))
    assert sorted(row for text in found for row in text) == list(range(len(rows)))
    for text in found:
        assert len({rows[row][1] for row in text}) == 1
        forwards = [rows[row][0] for row in text]
        assert forwards == sorted(forwards)
    assert [text[0] for text in found] == sorted(text[0] for text in found), (
        "in the order in which they began"
    )


# -- token ids as text ----------------------------------------------------------------------------------


def test_byt5_is_what_transformers_decodes() -> None:
    tokenizer = pytest.importorskip("transformers").ByT5Tokenizer()
    vocabulary = byt5()
    for token_id in tokenizer("a Z\n\t~", add_special_tokens=False)["input_ids"]:
        assert vocabulary.text(token_id) == tokenizer.decode([token_id])
    assert vocabulary.text(0xC3 + 3) == "<0xC3>"
    assert vocabulary.text(999) is None


def test_a_byte_level_tokenizer_reads_as_its_own_library_decodes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat\n sat on the  mat; déjà vu"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path)
    assert len(vocabulary) == made.get_vocab_size()
    compared = 0
    for token_id in range(len(vocabulary)):
        own = made.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in own:  # no character by itself
            assert vocabulary.text(token_id) == own
            compared += 1
    assert compared > 130


def test_a_sentencepiece_like_tokenizer_reads_spaces_and_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("\u2581the", -1.0), ("cat", -2.0), ("<0x0A>", -3.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
    assert [vocabulary.text(i) for i in range(5)] == ["<unk>", " the", "cat", "\n", None]


def test_a_json_vocabulary_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"<b>": 7, "x": 0}))
    assert read_vocabulary(tmp_path / "a.json").texts([7, 0, 3]) == {7: "<b>", 0: "x"}
    (tmp_path / "b.json").write_text(json.dumps(["x", "y"]))
    assert read_vocabulary(tmp_path / "b.json").text(1) == "y"


@pytest.mark.parametrize(
    "content", ["{", "7", '{"a": "b"}', '{"model": {}}', '{"model": {"vocab": [1]}}', "[" * 9999]
)
def test_what_is_no_vocabulary_is_refused_in_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="or a JSON vocabulary"):
        read_vocabulary(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        read_vocabulary(tmp_path / "missing")
