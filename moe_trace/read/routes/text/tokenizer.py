"""Decode token ids with a tokenizer's own files, without the library that wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_trace.data.errors import UsageError

TOKENIZER = "MOE_TRACE_TOKENIZER"
"""Environment variable with the argument that the TensorBoard tab passes to `read_vocabulary`."""
_BYTES = range(256)
_BYT5_FIRST = 3
"""ByT5's ids 0, 1 and 2 are padding, end and unknown; a byte's id is its value plus this."""
_BYT5 = {0: "<pad>", 1: "</s>", 2: "<unk>"}


class Vocabulary:
    """Mapping from token ids to text."""

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def text(self, token_id: int) -> str | None:
        """Return the token's text, with bytes that form no character as `<0xE2>`; None for an unknown id."""
        piece = self._pieces.get(token_id)
        if not isinstance(piece, bytes):
            return piece
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in piece)

    def texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """Return the texts of those ids that are known."""
        found = ((token_id, self.text(token_id)) for token_id in set(token_ids))
        return {token_id: text for token_id, text in found if text is not None}


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read a tokenizer's vocabulary.

    Args:
        path: A `tokenizer.json` as saved by transformers and tokenizers, a JSON object `{token: id}`, a JSON
            list of tokens, a folder with one of them, or the folder of a ByT5 model. `demo` is the tokenizer
            of `moe_trace.demo`.

    Raises:
        UsageError: The path is none of these.
    """
    if str(path) == "demo":
        return byt5()
    path = Path(path)
    if path.is_dir():
        config = path / "tokenizer_config.json"
        if config.is_file() and "ByT5" in str(_load(config).get("tokenizer_class")):
            return byt5()
        names = ("tokenizer.json", "vocab.json")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    content = _load(path)
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(_expected(path, f"JSON of another form ({type(error).__name__}: {error})")) from None


def byt5() -> Vocabulary:
    """Return ByT5's vocabulary, in which each byte is a token."""
    return Vocabulary({**_BYT5, **{byte + _BYT5_FIRST: bytes([byte]) for byte in _BYTES}})


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(_expected(path, error.strerror or str(error))) from None
    except (ValueError, RecursionError):
        raise UsageError(_expected(path, "a file that is no JSON")) from None


def _expected(path: Path, found: str) -> str:
    return (
        f"{path}: found {found}; expected a tokenizer.json, or a JSON vocabulary {{token: id}}. "
        "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) writes one"
    )


def _from_json(content: Any) -> Vocabulary:
    if not isinstance(content, dict) or "model" not in content:
        return Vocabulary(dict(_token_items(content)))
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        vocab = [token for token, _ in vocab]
    is_bytes = "ByteLevel" in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    read = _byte_level if is_bytes else _metaspace
    pieces: dict[int, str | bytes] = {token_id: read(token) for token_id, token in _token_items(vocab)}
    pieces |= {int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()}
    return Vocabulary(pieces)


def _token_items(vocab: Any) -> Iterable[tuple[int, str]]:
    if isinstance(vocab, list):
        return ((i, str(token)) for i, token in enumerate(vocab))
    return ((int(token_id), str(token)) for token, token_id in vocab.items())


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes map to themselves, others to characters from U+0100 on."""
    printing = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in _BYTES if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _byte_level(token: str) -> str | bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token


def _metaspace(token: str) -> str | bytes:
    """Decode SentencePiece's `▁` to a space, and `<0x0A>` to a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ")
