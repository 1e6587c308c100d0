"""Tests that every parallel mode on two gloo processes agrees with a single process on the same batch."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import numpy as np
import pytest

from distributed import checks
from distributed.launching import Ranks, transformers_splits_experts
from distributed.modes import FOUR_RANKS, MODES, TWO_RANKS
from spliced import recording_in

SHARDED_EXPERTS = ("ep_all_to_all", "ep_all_reduce", "ep_slices", "ep_auto")
SHARED_TOKENS = ("ep_all_reduce", "ep_slices", "ep_auto", "tp")
OWN_TOKENS = ("ep_all_to_all", "fsdp", "own_fsdp", "ddp", "alone")
MESHES = {
    "ep_all_to_all": {"fsdp": 2, "ep": 2},
    "ep_all_reduce": {"tp": 2, "ep": 2},
    "ep_slices": {"tp": 2, "ep": 2},
    "ep_auto": {"tp": 2, "ep": 2},
    "tp": {"tp": 2},
    "fsdp": {"fsdp": 2},
    "own_fsdp": {"fsdp": 2},
    "ddp": {"dp_replicate": 2},
    "alone": {},
    "efsdp": {"fsdp": 4, "ep": 2},
    "ep_wide": {"fsdp": 2, "tp": 2, "ep": 4},
}

pytestmark = pytest.mark.skipif(
    not transformers_splits_experts(), reason="this transformers splits no experts"
)


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_counts_over_ranks_are_those_of_the_single_process(
    mode: str, two_ranks: Ranks, alone: dict[str, Any]
) -> None:
    notes = two_ranks.notes(mode)
    checks.check_counts(notes, alone["counts"], "inference")
    checks.check_sharers_agree(notes, "inference")


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_training_counts_the_recomputation_apart(mode: str, two_ranks: Ranks, alone: dict[str, Any]) -> None:
    notes = two_ranks.notes(mode)
    checks.check_counts(notes, alone["counts"], "training")
    checks.check_counts(notes, alone["counts"], "training", phase="recompute")
    checks.check_sharers_agree(notes, "training")
    assert {s["stage"] for one in notes for s in one["training"]["samples"]} == {"train"}


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_nothing_is_changed_and_no_collective_added(mode: str, two_ranks: Ranks) -> None:
    notes = two_ranks.notes(mode)
    checks.check_untouched(notes)
    if mode != "alone":  # else equal counts would say nothing
        assert all(sum(one["training"]["bare"]["collectives"]) > 0 for one in notes)
        assert all(one["training"]["bare"]["events"] for one in notes)


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_a_rank_knows_its_part(mode: str, two_ranks: Ranks) -> None:
    for one in two_ranks.notes(mode):
        parallel, rank = one["parallel"], one["rank"]
        assert one["world_size"] == 2
        assert parallel["mesh"] == MESHES[mode]
        assert parallel["token_ranks"] == ([0, 1] if mode in SHARED_TOKENS else [rank])
        assert parallel["expert_ranks"] == ([0, 1] if mode in SHARDED_EXPERTS else [])
        held = [4 * rank + i for i in range(4)] if mode in SHARDED_EXPERTS else None
        assert [router["held_experts"] for router in one["routers"]] == [held] * 3


def test_every_mode_is_in_one_of_the_two_groups() -> None:
    assert {*SHARED_TOKENS, *OWN_TOKENS} == set(TWO_RANKS)
    assert {*MESHES, "mixed"} == set(MODES)


@pytest.mark.parametrize(
    ("mode", "inference", "training"),
    [
        ("ep_all_to_all", "all_to_all", "all_to_all"),
        ("ep_slices", "all_to_all", "all_to_all"),
        ("ep_all_reduce", "all_reduce", "all_reduce"),
        ("ep_auto", "all_reduce", "all_to_all"),
        ("tp", None, None),
        ("ddp", None, None),
    ],
)
def test_the_exchange_that_really_ran(
    mode: str, inference: str | None, training: str | None, two_ranks: Ranks
) -> None:
    for one in two_ranks.notes(mode):
        assert one["parallel"]["expert_exchange"] == inference
        assert one["training"]["exchange"] == training
        assert bool(one["inference"]["splits"]) is (inference == "all_to_all")
        assert bool(one["training"]["splits"]) is (training == "all_to_all")


@pytest.mark.parametrize(
    ("mode", "part"),
    [
        ("ep_all_to_all", "inference"),
        ("ep_all_to_all", "training"),
        ("ep_slices", "inference"),
        ("ep_slices", "training"),
        ("ep_auto", "training"),
    ],
)
def test_recorded_sent_and_received_are_one_matrix(
    mode: str, part: str, two_ranks: Ranks, alone: dict[str, Any]
) -> None:
    notes = two_ranks.notes(mode)
    checks.check_exchange(notes, alone["counts"], part)
    checks.check_bytes(notes, part)


def test_bytes_follow_the_type_that_the_experts_receive(two_ranks: Ranks) -> None:
    """FSDP's mixed precision casts to bfloat16 between the block and its experts."""
    notes = two_ranks.notes("mixed")
    for part in ("inference", "training"):
        assert {s["slot_bytes"] for one in notes for s in one[part]["samples"]} == {32 * 2}
        checks.check_bytes(notes, part)
    checks.check_untouched(notes)


def test_slices_are_recorded_only_where_ranks_share_tokens(two_ranks: Ranks) -> None:
    for mode in TWO_RANKS:
        for one in two_ranks.notes(mode):
            for sample in one["training"]["samples"]:
                assert (sample["dispatched"] is not None) is (mode in ("ep_slices", "ep_auto"))


def test_a_forward_that_all_reduces_sends_nothing(two_ranks: Ranks) -> None:
    for one in two_ranks.notes("ep_auto"):
        assert [sum(s["dispatched"]) for s in one["inference"]["samples"]] == [0, 0, 0]


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_the_models_figures_are_those_of_the_whole_model(
    mode: str, two_ranks: Ranks, alone: dict[str, Any]
) -> None:
    recording = alone["recording"]
    for one in two_ranks.notes(mode):
        for router, expected in zip(one["routers"], recording.routers, strict=True):
            for name in (
                "num_experts",
                "top_k",
                "router_class",
                "experts_class",
                "router_flops_per_token",
                "expert_flops_per_slot",
                "parameters",
            ):
                assert router[name] == getattr(expected, name), name
        for name in ("class", "num_parameters", "hidden_size", "num_layers"):
            assert one["model"][name] == recording.model[name], name


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_logits_are_those_of_the_single_process(mode: str, two_ranks: Ranks, alone: dict[str, Any]) -> None:
    """Else equal counts could be those of a model that was loaded wrongly."""
    parts = [np.array(one["inference"]["logits"]) for one in checks.by_token_set(two_ranks.notes(mode))]
    np.testing.assert_allclose(np.concatenate(parts), alone["logits"], atol=1e-4)


@pytest.mark.parametrize("mode", FOUR_RANKS)
def test_four_ranks_that_hold_experts_twice_or_share_tokens(
    mode: str, four_ranks: Ranks, alone: dict[str, Any]
) -> None:
    notes = four_ranks.notes(mode)
    for part in ("inference", "training"):
        checks.check_counts(notes, alone["counts"], part)
        checks.check_sharers_agree(notes, part)
        checks.check_exchange(notes, alone["counts"], part)
        checks.check_bytes(notes, part)
    checks.check_untouched(notes)
    assert [one["parallel"]["mesh"] for one in notes] == [MESHES[mode]] * 4
    experts_each = 4 if mode == "efsdp" else 2
    for one in notes:
        first = one["parallel"]["expert_ranks"].index(one["rank"]) * experts_each
        assert checks.held_by(one, "L00") == list(range(first, first + experts_each))
    groups = {tuple(one["parallel"]["expert_ranks"]) for one in notes}
    assert groups == ({(0, 1), (2, 3)} if mode == "efsdp" else {(0, 1, 2, 3)})


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_each_rank_writes_a_trace_under_its_name(mode: str, two_ranks: Ranks) -> None:
    files = sorted(two_ranks.traces(mode).glob("*.pt.trace.json.gz"))
    assert len(files) == 2
    for rank, file in enumerate(sorted(files, key=lambda f: f.name.split(".")[1])):
        assert re.fullmatch(rf".+\.rank{rank}\.\d+\.pt\.trace\.json\.gz", file.name)
        trace = json.loads(gzip.decompress(file.read_bytes()))
        assert trace["distributedInfo"]["rank"] == rank
        assert trace["distributedInfo"]["world_size"] == 2
        assert recording_in(trace)["rank"] == rank
        labels = [e["args"]["labels"] for e in trace["traceEvents"] if e.get("name") == "process_labels"]
        assert f"rank {rank}" in labels


def test_scalars_of_ranks_do_not_mix(two_ranks: Ranks) -> None:
    folders = sorted(f.parent.name for f in two_ranks.traces("ddp").glob("*/events.out.tfevents.*"))
    assert folders == ["rank0", "rank1"]


def test_tb_profiler_and_hta_see_two_ranks(two_ranks: Ranks) -> None:
    consts = pytest.importorskip("torch_tb_profiler.consts")
    workers = {
        consts.WORKER_PATTERN.match(f.name).group(1)
        for f in two_ranks.traces("tp").glob("*.pt.trace.json.gz")
    }
    assert len(workers) == 2
    trace_file = pytest.importorskip("hta.common.trace_file")
    found, ranks = trace_file.create_rank_to_trace_dict_from_dir(str(two_ranks.traces("tp")))
    assert found
    assert sorted(ranks) == [0, 1]
