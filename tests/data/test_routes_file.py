"""The file of routes: it gives back what was saved, cut anywhere or damaged it never gives anything else."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import RecordedRoutes, read_routes
from moe_trace.data.errors import MoETraceError, OutputError
from moe_trace.data.routes.columns import concatenate
from moe_trace.data.routes.reader import IncompleteRoutes, RoutesWriter, save_routes

BIG = 1 << 40


def routes_of(
    tokens: int = 6,
    *,
    layers: int = 2,
    slots: int = 2,
    experts: int = 5,
    seed: int = 0,
    optional: bool = False,
    prefix: str = "layers",
) -> RecordedRoutes:
    rng = np.random.default_rng(seed)
    kind = np.uint8 if experts <= 255 else np.uint16
    routes = RecordedRoutes(
        expert_ids=rng.integers(0, experts, (tokens, layers, slots)).astype(kind),
        layers=tuple(f"{prefix}.{i}.gate" for i in range(layers)),
        num_experts=(experts,) * layers,
        top_k=(slots,) * layers,
        padding=rng.random(tokens) < 0.3,
        step=rng.integers(-BIG, BIG, tokens),
        forward=np.sort(rng.integers(0, BIG, tokens)),
        sequence=rng.integers(-1, 9, tokens).astype(np.int32),
        position=rng.integers(-1, 99, tokens).astype(np.int32),
        stage_codes=rng.integers(0, 3, tokens).astype(np.uint8),
        rank=3,
        world_size=4,
        model={"name": "demo", "class": "OlmoeForCausalLM"},
        versions={"torch": "2.11.0"},
        dropped={"over max_mib": 7},
    )
    if not optional:
        return routes
    return replace(
        routes,
        recomputed=rng.random(tokens) < 0.5,
        lost_layers=rng.random((tokens, layers)) < 0.5,
        weights=rng.random((tokens, layers, slots)).astype(np.float16),
        token_ids=rng.integers(0, 1 << 30, tokens).astype(np.int32),
    )


def assert_same(found: RecordedRoutes, expected: RecordedRoutes) -> None:
    assert len(found.groups) == len(expected.groups)
    for one, other in zip(found.groups, expected.groups, strict=True):
        assert one.columns().keys() == other.columns().keys()
        for name, column in other.columns().items():
            assert one.columns()[name].dtype == column.dtype, name
            np.testing.assert_array_equal(one.columns()[name], column, err_msg=name)
        for name in ("layers", "num_experts", "top_k", "rank", "world_size", "model", "versions", "dropped"):
            assert getattr(one, name) == getattr(other, name), name


def read_quietly(path: Path) -> RecordedRoutes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteRoutes)
        return read_routes(path)


def appended(path: Path, parts: int = 2) -> tuple[list[RecordedRoutes], bytes]:
    """A file of as many chunks, and what of it a crash before its end would have left."""
    written = [routes_of(4 + i, seed=i, optional=i % 2 == 1) for i in range(parts)]
    with RoutesWriter(path) as writer:
        for part in written:
            writer.append(part)
            writer.flush()
        left = path.read_bytes()
    return written, left


shapes = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 40),
        "layers": st.integers(1, 4),
        "slots": st.integers(1, 5),
        "experts": st.sampled_from([1, 5, 64, 255, 256, 5000]),
        "seed": st.integers(0, 1000),
        "optional": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, group=shapes, level=st.integers(0, 9))
def test_what_was_saved_is_read(
    shape: dict[str, Any], group: dict[str, Any], level: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("routes") / "a.routes.npz"
    routes = replace(routes_of(**shape), others=(routes_of(**group, prefix="vision"),))
    assert routes.save(path, level=level) == path
    assert_same(read_routes(path), routes)
    assert read_routes(path).incomplete == ""


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.booleans()), min_size=1, max_size=6),
    chunk_bytes=st.sampled_from([1, 16, 64, 1 << 20]),
)
def test_parts_that_were_appended_are_read_as_one(
    parts: list[tuple[int, bool, bool]], chunk_bytes: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("routes") / "a.routes.npz"
    written = [routes_of(tokens, seed=i, optional=extra) for i, (tokens, extra, _) in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_trace.data.routes.writer.CHUNK_BYTES", chunk_bytes)
        with RoutesWriter(path) as writer:
            for part, (_, _, flush) in zip(written, parts, strict=True):
                writer.append(part)
                if flush:
                    writer.flush()
    assert_same(read_routes(path), concatenate(written))


def test_a_group_that_is_met_later_is_kept(tmp_path: Path) -> None:
    text, vision = routes_of(5), routes_of(3, layers=1, prefix="vision", seed=1)
    with RoutesWriter(tmp_path / "a.routes.npz") as writer:
        writer.append(text)
        writer.append(replace(text, others=(vision,)))
    read = read_routes(tmp_path / "a.routes.npz")
    assert_same(read, replace(concatenate([text, text]), others=(vision,)))


def test_numpy_opens_the_file(tmp_path: Path) -> None:
    routes = routes_of(optional=True)
    routes.save(tmp_path / "a.routes.npz")
    with np.load(tmp_path / "a.routes.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["c000000.expert_ids"].swapaxes(0, 1), routes.expert_ids)
        np.testing.assert_array_equal(file["c000000.weights"].swapaxes(0, 1), routes.weights)
        header = json.loads(file["header.0.json"])
    assert header["groups"][0]["layers"] == list(routes.layers) and header["model"] == routes.model


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    routes_of().save(tmp_path / "a.routes.npz")
    code = "import sys, moe_trace as m; m.read_routes(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.routes.npz"], check=True)


def test_a_file_cut_at_any_byte_gives_its_whole_chunks_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    written, _ = appended(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        after = {one.filename: two.header_offset for one, two in pairwise(archive.infolist())}
        ends = [after.get(f"c{i:06}.json", archive.start_dir) for i in range(len(written))]
    seen = set()
    for cut in [*range(0, ends[0], 9), *range(ends[0] - 5, ends[1] + 5), *range(ends[1], len(data), 29)]:
        path.write_bytes(data[:cut])
        chunks = sum(end <= cut for end in ends)
        if not chunks:
            with pytest.raises(MoETraceError) as error:
                read_routes(path)
            assert "\n" not in str(error.value)
            continue
        with pytest.warns(IncompleteRoutes, match=f"{chunks} whole chunks"):
            found = read_routes(path)
        assert f"last {cut - ends[chunks - 1]:,} bytes" in found.incomplete
        assert_same(found, concatenate(written[:chunks]))
        seen.add(chunks)
    assert seen == {1, 2}


@pytest.fixture(scope="module")
def two_chunks(tmp_path_factory: Any) -> tuple[Path, list[RecordedRoutes], bytes, bytes]:
    path = tmp_path_factory.mktemp("routes") / "changed.npz"
    written, left = appended(path)
    return path, written, path.read_bytes(), left


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_changed_byte_never_gives_other_routes(data: st.DataObject, two_chunks: Any) -> None:
    path, written, *contents = two_chunks
    content = bytearray(data.draw(st.sampled_from(contents)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_quietly(path)
    except MoETraceError as error:
        assert "\n" not in str(error) and "changed.npz" in str(error)
        return
    chunks = next(i for i in (1, 2) if len(concatenate(written[:i])) == len(found))
    assert chunks == 2 or found.incomplete
    assert_same(found, concatenate(written[:chunks]))


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def members_of(routes: RecordedRoutes, path: Path) -> dict[str, bytes]:
    save_routes(routes, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def hostile(members: dict[str, bytes]) -> dict[str, dict[str, bytes] | bytes]:
    ids = "c000000.expert_ids.npy"
    end = json.loads(members["c000000.json"])
    header = json.loads(members["header.0.json"])

    def with_ids(data: bytes) -> dict[str, bytes]:
        columns = end["columns"] | {"expert_ids": zlib.crc32(data)}
        return members | {ids: data, "c000000.json": json.dumps(end | {"columns": columns}).encode()}

    def with_header(**changes: Any) -> dict[str, bytes]:
        return members | {"header.0.json": json.dumps(header | changes).encode()}

    group = header["groups"][0]
    return {
        "empty": b"",
        "text": b"layer,expert\n0,1\n",
        "json": json.dumps(header).encode(),
        "zeros": bytes(100_000),
        "no header": {name: data for name, data in members.items() if name != "header.0.json"},
        "no ids": {name: data for name, data in members.items() if name != ids},
        "no end": {name: data for name, data in members.items() if name != "c000000.json"},
        "path": {**members, "../../evil.npy": b"x"},
        "other member": {**members, "c000001.weights.npy": b"x"},
        "wide ids": with_ids(npy(np.full((2, 6, 2), 1 << 32))),
        "more rows": with_ids(npy(np.zeros((2, 7, 2), np.uint8))),
        "other axes": with_ids(npy(np.zeros((6, 2, 2), np.uint8))),
        "pickle": with_ids(npy(np.array([[[print]]], object), pickled=True)),
        "bomb": with_ids(npy(np.zeros(100_000_000, np.uint8))),
        "no array": with_ids(b"x" * 152),
        "bool of 7": members | {"c000000.padding.npy": npy(np.full(6, 7, np.uint8).view(bool))},
        "huge header": with_header(model={"name": "x" * (17 << 20)}),
        "deep header": members | {"header.0.json": b"[" * 200_000},
        "other version": with_header(version=2),
        "other version of another form": with_header(version=2, groups={}),
        "no format": members | {"header.0.json": json.dumps({"groups": header["groups"]}).encode()},
        "other format": with_header(format="npz"),
        "groups of null": with_header(groups=[None]),
        "experts of text": with_header(groups=[group | {"num_experts": ["5", "5"]}]),
        "slots of 2**40": with_header(groups=[group | {"slots": 1 << 40}]),
        "ids of 64 bits": with_header(groups=[group | {"type": "<i8"}]),
        "tokens of 2**40": members | {"c000000.json": json.dumps(end | {"tokens": 1 << 40}).encode()},
        "tokens below 0": members | {"c000000.json": json.dumps(end | {"tokens": -6}).encode()},
        "group 9": members | {"c000000.json": json.dumps(end | {"group": 9}).encode()},
        "second header": {**members, "header.1.json": members["header.0.json"]},
    }


CASES = list(hostile({"c000000.json": b'{"columns": {}}', "header.0.json": b'{"groups": [{}]}'}))


@pytest.mark.parametrize("case", CASES)
def test_hostile_files_give_one_line_and_take_no_memory(case: str, tmp_path: Path) -> None:
    content = hostile(members_of(routes_of(), tmp_path / "good.npz"))[case]
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        zip_of(path, content)
    tracemalloc.start()
    with pytest.raises(MoETraceError) as error:
        read_routes(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and "bad.npz" in message and "expected" in message
    assert peak < 64 << 20
    assert "version 2 of the format" in message or "version" not in case
    assert "another format, 'None'" in message or case != "no format"


def test_many_chunks_of_zeros_are_refused_before_they_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_trace.data.routes.reader._FREE_BYTES", 1 << 22)
    routes = routes_of(1 << 18)
    for column in routes.columns().values():
        column[:] = 0
    for tokens, fits in ((1 << 17, True), (1 << 18, False)):
        path = routes[:tokens].save(tmp_path / "zeros.npz", level=9)
        if fits:
            assert len(read_routes(path)) == tokens
            continue
        with pytest.raises(MoETraceError, match="would expand to"):
            read_routes(path)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(MoETraceError, match="cannot be read"):
            read_routes(path)
    np.savez(tmp_path / "other.npz", routed_experts=np.zeros((3, 2, 2), np.int16))
    with pytest.raises(MoETraceError, match="routes import"):
        read_routes(tmp_path / "other.npz")


def test_what_cannot_be_written_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        RoutesWriter(tmp_path / "none" / "a.npz")
    old, bad = tmp_path / "a.npz", routes_of()
    routes_of().save(old)
    before = old.read_bytes()
    with pytest.raises(ValueError, match="token_ids"):
        replace(bad, token_ids=np.full(len(bad), 1 << 40)).save(old)
    assert old.read_bytes() == before and list(tmp_path.iterdir()) == [old]


def test_parts_of_other_experts_are_refused(tmp_path: Path) -> None:
    with RoutesWriter(tmp_path / "a.npz") as writer:
        writer.append(routes_of())
        with pytest.raises(ValueError, match="num_experts"):
            writer.append(routes_of(experts=7))
    with pytest.raises(ValueError, match="closed"):
        writer.append(routes_of())
    assert_same(read_routes(tmp_path / "a.npz"), routes_of())


def test_a_disk_that_fills_is_said(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OutputError, match="/dev/full"):
        writer = RoutesWriter("/dev/full")
        writer.append(routes_of(20_000))
        writer.close()
