"""`moe-trace placement`: what it reads, prints, writes and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from placement_truth import COUNTS_FILE

from moe_trace.cli import main
from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import Parallel
from moe_trace.placement.map_file import read_map
from moe_trace.placement.recorded import counts_of_recordings
from moe_trace.read.reader import read_recording
from paths import DATA
from tiny_trace import write_tiny

RUN = DATA / "gloo_ep2"


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["placement", *(str(a) for a in arguments)])
    return code, out.getvalue(), err.getvalue()


def report(*arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--format", "json")
    assert code == 0, err
    return json.loads(out)


def uneven(layer: int, call: int) -> tuple[int, ...]:
    """Experts 0 and 1 stand on one of two ranks and are hot; 20 assignments, mean load of a rank 10."""
    return (8, 8, 2, 2) if call % 2 == 0 else (9, 7, 3, 1)


# -- traces -------------------------------------------------------------------------------------------


def test_round_numbers_of_a_trace(tmp_path: Path) -> None:
    """Chosen on step 0 and judged on step 1, and the other way round; by hand."""
    found = report(write_tiny(tmp_path / "a.json", calls=2, counts=uneven), "--ranks", "2")
    assert found["split"]["in_sample"] is False and found["judged_observations"] == 2
    assert [fold["judged"] for fold in found["split"]["folds"]] == [["1"], ["0"]]
    contiguous, balanced, replicated = found["clusters"][0]["plans"]
    assert contiguous["max_over_mean"] == [[1.6, 1.6], [1.6, 1.6]]
    assert contiguous["rank_loads"] == [[32, 8], [32, 8]]
    # One hot and one cold expert a rank: 9 + 1 and 7 + 3, or 9 + 3 and 7 + 1.
    assert all(value in (1.0, 1.2) for value in np.ravel(balanced["max_over_mean"]))
    assert np.sum(balanced["slots_own_rank"]) == np.sum(balanced["slots_own_node"]) == 40
    assert replicated["slots_own_rank"][0] > 20
    assert found["layers"][0]["slot_bytes"] == 16  # hidden size 8 in bfloat16


def test_text_says_what_was_held_out_and_moved(tmp_path: Path) -> None:
    code, out, _ = run(write_tiny(tmp_path / "a.json", calls=4, counts=uneven), "--ranks", "2,4")
    assert code == 0
    assert "Plans are chosen on every second step (2), judged on the others (2)" in out.replace("\n", " ")
    assert "4 ranks: one expert a rank, so only copies can balance." in out.replace("\n    ", " ")
    # 40 slots a step over both layers, half leave their rank, 16 bytes, both ways.
    line = next(line for line in out.splitlines() if line.startswith("2     "))
    assert "contiguous" in line and "640 B" in line
    assert max(map(len, out.splitlines())) <= 100


def test_one_step_is_in_sample_and_says_so(tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "a.json", calls=1, counts=uneven)
    code, out, _ = run(trace, "--ranks", "2")
    assert code == 0 and "in-sample" in out and "In-sample" in out
    assert report(trace, "--ranks", "2")["split"]["in_sample"] is True
    assert run(trace, "--ranks", "2", "--split", "halves")[0] == 2


def test_a_batch_that_repeats_holds_nothing_out(tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "a.json", calls=4, counts=lambda layer, call: (8, 8, 2, 2))
    for split in ("alternate", "halves", "each"):
        found = report(trace, "--ranks", "2", "--split", split)["split"]
        assert found["in_sample"] is True and "same counts" in found["words"]
    other = write_tiny(tmp_path / "b.json", calls=4, counts=lambda layer, call: (8, 8, 2, 2 + call // 3))
    assert report(other, "--ranks", "2", "--split", "halves")["split"]["in_sample"] is False


def test_steps_can_be_named(tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "a.json", calls=5, counts=uneven)
    found = report(trace, "--ranks", "2", "--choose-on", "0-2", "--judge-on", "3,4")
    assert found["split"]["folds"] == [{"chosen": ["0", "1", "2"], "judged": ["3", "4"]}]
    others = report(trace, "--ranks", "2", "--choose-on", "1")["split"]["folds"][0]["judged"]
    assert others == ["0", "2", "3", "4"]
    halves = report(trace, "--ranks", "2", "--split", "halves")["split"]["folds"]
    assert [fold["chosen"] for fold in halves] == [["0", "1"], ["2", "3", "4"]]


def test_ranks_with_the_same_tokens_count_once(tmp_path: Path) -> None:
    base = read_recording(write_tiny(tmp_path / "a.json", calls=2, counts=uneven))

    def rank(number: int, token_ranks: tuple[int, ...]) -> Any:
        parallel = Parallel(mesh={"ep": 2}, token_ranks=token_ranks)
        return replace(base, rank=number, world_size=2, parallel=parallel)

    shared = counts_of_recordings([rank(0, (0, 1)), rank(1, (0, 1))], "x")
    apart = counts_of_recordings([rank(0, (0,)), rank(1, (1,))], "x")
    alone = counts_of_recordings([rank(1, (0, 1))], "x")
    assert shared.counts_SLE.sum() == alone.counts_SLE.sum() == 80 and apart.counts_SLE.sum() == 160
    assert shared.labels == apart.labels == ("0", "1")
    half = counts_of_recordings([rank(0, (0,))], "x")
    assert "only 1 are here" in half.notes[0]
    runs = counts_of_recordings([base, base], "x")
    assert runs.labels == ("0:0", "0:1", "1:0", "1:1") and runs.counts_SLE.sum() == 160


def test_a_folder_of_ranks_counts_as_its_merged_trace(tmp_path: Path) -> None:
    """Merged beside its parts it counts once; a rank whose file broke is named, the other is kept."""
    folder = shutil.copytree(RUN, tmp_path / "run")
    whole = report(folder, "--ranks", "2")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["merge", str(folder), "--out", str(tmp_path / "merged.pt.trace.json")]) == 0
    merged = report(tmp_path / "merged.pt.trace.json", "--ranks", "2")
    assert merged["clusters"] == whole["clusters"]
    assert np.sum(whole["clusters"][0]["plans"][0]["rank_loads"]) == 262_144
    shutil.copy(tmp_path / "merged.pt.trace.json", folder)
    both = report(folder, "--ranks", "2")
    assert both["clusters"] == whole["clusters"] and "left out: it is merged" in both["notes"][0]
    (folder / "merged.pt.trace.json").unlink()
    (folder / "rank1.pt.trace.json.gz").write_bytes(b"")
    half = report(folder, "--ranks", "2")
    assert "one of the traces was left out" in half["notes"][0] and "rank1" in half["notes"][0]
    assert np.sum(half["clusters"][0]["plans"][0]["rank_loads"]) == 131_072


def test_recomputed_calls_and_identity_experts_are_no_load(tmp_path: Path) -> None:
    base = read_recording(write_tiny(tmp_path / "a.json", calls=2, counts=uneven))
    again = tuple(replace(s, phase="recompute") if s.step == 1 else s for s in base.samples)
    routers = tuple(replace(r, identity_experts=2) for r in base.routers)
    found = counts_of_recordings([replace(base, samples=again, routers=routers)], "x")
    assert found.counts_SLE.tolist() == [[[8, 8], [8, 8]]]


# -- files of counts ----------------------------------------------------------------------------------


def test_exported_counts_give_the_same_as_the_trace(tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "a.json", calls=1, counts=uneven)
    plans = report(trace, "--ranks", "2")["clusters"]
    for name in ("counts.npy", "counts.json"):
        with contextlib.redirect_stderr(io.StringIO()):
            main(["export", str(trace), "--to", "eplb", "--out", str(tmp_path / name)])
        found = report(tmp_path / name, "--ranks", "2", "--slot-bytes", "16")
        assert found["clusters"] == plans and found["split"]["in_sample"]
        one = report(tmp_path / name, "--ranks", "2", "--layer", "1")
        assert [layer["site"] for layer in one["layers"]] == ["L01"]


def test_texts_are_judged_by_plans_of_the_others() -> None:
    found = report(COUNTS_FILE, "--ranks", "8")
    assert found["kind"] == "text" and len(found["split"]["folds"]) == 6
    assert all(len(fold["chosen"]) == 5 for fold in found["split"]["folds"])
    named = report(COUNTS_FILE, "--choose-on", "c4", "--judge-on", "github")
    assert named["split"]["words"] == "plans are chosen on c4, judged on github"
    assert named["clusters"][0]["plans"][0]["max_over_mean"][0] == pytest.approx(
        [1.273, 2.141, 1.281], abs=1e-3
    )


def test_steps_in_an_array(tmp_path: Path) -> None:
    array = np.random.default_rng(0).poisson(9, (6, 2, 8))
    np.save(tmp_path / "a.npy", array)
    found = report(tmp_path / "a.npy", "--ranks", "4", "--nodes", "2")
    assert found["kind"] == "step" and len(found["labels"]) == 6
    plans = found["clusters"][0]["plans"]
    assert [p["plan"] for p in plans] == ["contiguous", "balanced", "replicated", "hierarchical"]
    for plan in plans:
        slots = np.sum([plan[f"slots_{where}"] for where in ("own_rank", "own_node", "other_node")], axis=0)
        assert np.allclose(slots, array.sum(axis=(0, 2)))


# -- the map ------------------------------------------------------------------------------------------


def test_the_map_says_where_every_expert_stands(tmp_path: Path) -> None:
    target = tmp_path / "map.json"
    code, _, err = run(COUNTS_FILE, "--ranks", "8,16", "--nodes", "2", "--out", target)
    assert code == 0 and f"wrote {target}" in err
    found = read_map(target)
    assert (found.num_experts, found.model, len(found.plans)) == (64, "OLMoE-1B-7B-0924", 8)
    for plan in found.plans:
        assert [layer.site for layer in plan.layers] == ["L00", "L07", "L15"]
        for layer in plan.layers:
            flat = [expert for rank in layer.physical_to_logical for expert in rank]
            assert sorted(set(flat)) == list(range(64)) and len(flat) == plan.ranks * plan.slots_per_rank
            for expert, slots in enumerate(layer.logical_to_physical):
                assert [flat[slot] for slot in slots] == [expert] * layer.replica_count[expert]
    assert run(COUNTS_FILE, "--out", target)[0] == 6  # never replaced unasked
    assert run(COUNTS_FILE, "--out", target, "--force")[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["plans"][0]["layers"][0]["physical_to_logical"][0].reverse(),
        lambda m: m["plans"][0]["layers"][0]["physical_to_logical"][0].__setitem__(0, 64),
        lambda m: m["plans"][0]["layers"][0]["replica_count"].__setitem__(3, 2),
        lambda m: m["plans"][0].__setitem__("ranks", 4),
        lambda m: m.__setitem__("version", 2),
        lambda m: m.__setitem__("format", "other"),
        lambda m: m.pop("plans"),
    ],
)
def test_a_map_that_was_changed_is_refused(tmp_path: Path, change: Any) -> None:
    target = tmp_path / "map.json"
    run(COUNTS_FILE, "--out", target)
    plain = json.loads(target.read_text())
    change(plain)
    target.write_text(json.dumps(plain))
    with pytest.raises(TraceFileError):
        read_map(target)


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "7"), "7 ranks for 64 experts"),
        (("--ranks", "256"), "256 ranks for 64 experts"),
        (("--ranks", "0"), "found --ranks 0"),
        (("--ranks", "8,x"), "found --ranks 8,x"),
        (("--ranks", ""), "expected whole numbers"),
        (("--ranks", "9" * 50), "expected whole numbers"),
        (("--nodes", "3"), "choose --nodes from 1, 2, 4, 8"),
        (("--nodes", "0"), "0 nodes"),
        (("--replicas", "0"), "found --replicas 0"),
        (("--replicas", "-1"), "found --replicas -1"),
        (("--groups", "5"), "found 5 groups"),
        (("--slot-bytes", "0"), "found --slot-bytes 0"),
        (("--layer", "99"), "found no layer"),
        (("--step", "1"), "these are counts"),
        (("--choose-on", "nowhere"), "expected texts"),
        (("--choose-on", ""), "without a name"),
        (("--judge-on", "c4", "--split", "each"), "drop one"),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], words: str) -> None:
    code, out, err = run(COUNTS_FILE, *options)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def counts_file(**changes: Any) -> bytes:
    return json.dumps({"counts": {"a": [[1, 2], [3, 4]]}, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (counts_file(counts={}), "no counts"),
        (counts_file(counts=[]), "no counts"),
        (counts_file(counts={"a": []}), "no counts"),
        (counts_file(counts={"a": [[]]}), "no counts"),
        (counts_file(counts={"a": [[0, 0], [0, 0]]}), "no assignment"),
        (counts_file(counts={"a": [[1, -2], [3, 4]]}), "negative"),
        (counts_file(counts={"a": [[1, 2], [3]]}), "different lengths"),
        (counts_file(counts={"a": [[1, 2]], "b": [[1, 2], [3, 4]]}), "different lengths"),
        (counts_file(counts={"a": [[1.5, 2], [3, 4]]}), "another form"),
        (counts_file(counts={"a": [["x", 2], [3, 4]]}), "another form"),
        (counts_file(counts={"a": [[2**60, 2], [3, 4]]}), "2^53"),
        (counts_file(counts={"a": [[2**90, 2], [3, 4]]}), "found"),
        (counts_file(counts=7), "another form"),
        (counts_file(layers=[0, 1, 2]), "3 layers"),
        (b'{"counts": ' + b"[" * 100_000, "found"),
        (b'{"counts": {"a": [[NaN, 1]]}}', "another form"),
        (b'{"counts": {"a"', "found"),
        (b"[]", "found"),
        (b"", "empty"),
        (b"\x00\xff", "found"),
        (b'{"traceEvents": []}', "without moe_trace data"),
        (b"{}", "traceEvents"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    code, out, err = run(path, "--ranks", "2")
    assert code in (2, 5) and out == "" and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 4)), "float64"),
        (np.ones(4, int), "[4]"),
        (np.zeros((0, 4), int), "found counts of the form"),
        (np.ones((1, 1, 9000), int), "at most 8192"),
        (np.full((1, 2), 2**64 - 1, np.uint64), "2^53"),
    ],
)
def test_hostile_arrays(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    code, out, err = run(tmp_path / "a.npy", "--ranks", "1")
    assert (code, out) == (2, "") and words in err


def test_no_pickle_is_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert run(tmp_path / "a.npy")[0] == 2
    (tmp_path / "b.npy").write_bytes(b"nothing")
    assert run(tmp_path / "b.npy")[0] == 2
    assert run(tmp_path / "missing.npy")[0] == 2
    assert run(tmp_path / "missing.json")[0] == 5


def test_names_from_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    plain = {"model": "\x1b[31mred", "layers": [{"site": "\x1b]0;x\x07"}], "counts": {"\x1b[2J": [[1, 2]]}}
    path.write_bytes(msgspec.json.encode(plain))
    code, out, _ = run(path, "--ranks", "2")
    assert code == 0 and "\x1b" not in out and "\x07" not in out


def test_a_layer_without_load_is_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[[4, 4, 0, 0], [0, 0, 0, 0]]] * 2))
    found = report(tmp_path / "a.npy", "--ranks", "2")
    plans = found["clusters"][0]["plans"]
    assert plans[0]["max_over_mean"] == [[2.0, None], [2.0, None]]
    assert plans[1]["max_over_mean"] == [[1.0, None], [1.0, None]]
    assert run(tmp_path / "a.npy", "--ranks", "2")[0] == 0


def test_a_big_model_takes_seconds() -> None:
    """61 layers of 256 experts on 256 ranks of 32 nodes; generous, for machines under load."""
    import time

    from moe_trace.placement.plan import Cluster
    from moe_trace.placement.planner import PlanOptions, blocks_of, make_plans

    random = np.random.default_rng(0)
    counts = random.poisson(20 * random.lognormal(0, 1, (61, 256)), (8, 61, 256))
    start = time.perf_counter()
    plans = make_plans(blocks_of(counts), PlanOptions(cluster=Cluster(256, 32)))
    assert time.perf_counter() - start < 20
    assert all(plan.experts_LP.shape[0] == 61 for plan in plans)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("expert_distribution.pt", b"PK\x03\x04..."),
        ("counts.csv", b"layer,expert,count\n0,0,7\n"),
        ("counts.jsonl", b'{"layer": 0, "counts": [1, 2]}\n{"layer": 1, "counts": [3, 4]}\n'),
        ("counts.json", b"[[1, 2], [3, 4]]"),
        ("counts.pkl", b"\x80\x04..."),
        ("counts", b"1 2\n3 4\n"),
    ],
)
def test_counts_of_other_tools_are_told_which_counts_are_taken(
    name: str, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    code, out, err = run(tmp_path / name)
    assert (code, out) == (2, "")
    assert "export --to eplb" in err and ".npy" in err
