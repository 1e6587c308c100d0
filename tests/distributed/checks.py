"""Checks of the notes of all ranks, both on a CPU over gloo and on GPUs over NCCL."""

from __future__ import annotations

from typing import Any

import numpy as np

Notes = list[dict[str, Any]]


def by_token_set(notes: Notes) -> list[dict[str, Any]]:
    """One rank of each set that sees the same tokens: the first of its `token_ranks`."""
    return [one for one in notes if one["parallel"]["token_ranks"][0] == one["rank"]]


def counts(samples: list[dict[str, Any]], *, phase: str = "forward") -> dict[str, np.ndarray]:
    """Assignments per router."""
    sums: dict[str, np.ndarray] = {}
    for sample in samples:
        if sample["phase"] == phase:
            added = np.array(sample["assignments"])
            sums[sample["site"]] = sums[sample["site"]] + added if sample["site"] in sums else added
    return sums


def check_counts(notes: Notes, expected: dict[str, np.ndarray], part: str, *, phase: str = "forward") -> None:
    """Counts over ranks, each token set once, are those of the single process: exactly."""
    found = [counts(one[part]["samples"], phase=phase) for one in by_token_set(notes)]
    assert found[0].keys() == expected.keys()
    for site, want in expected.items():
        assert sum(one[site] for one in found).tolist() == want.tolist(), site


def check_sharers_agree(notes: Notes, part: str) -> None:
    """Ranks that say that they see the same tokens have the same counts."""
    for one in notes:
        for rank in one["parallel"]["token_ranks"]:
            other = notes[rank]
            assert other["parallel"]["token_ranks"] == one["parallel"]["token_ranks"]
            ours, theirs = counts(one[part]["samples"]), counts(other[part]["samples"])
            assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}


def sent_matrices(notes: Notes, part: str, phase: str = "forward") -> dict[str, np.ndarray]:
    """[rank, rank] of each router, from the recording alone: slots that a rank sends to a holder."""
    matrices: dict[str, np.ndarray] = {}
    for one in notes:
        for sample in one[part]["samples"]:
            if sample["phase"] != phase:
                continue
            dispatched = sample["assignments"] if sample["dispatched"] is None else sample["dispatched"]
            matrix = matrices.setdefault(sample["site"], np.zeros((len(notes), len(notes)), dtype=np.int64))
            for rank in one["parallel"]["expert_ranks"]:
                held = held_by(notes[rank], sample["site"])
                matrix[one["rank"], rank] += np.array(dispatched)[held].sum()
    return matrices


def held_by(one: dict[str, Any], site: str) -> list[int]:
    (router,) = [r for r in one["routers"] if r["site"] == site]
    held: list[int] = router["held_experts"]
    return held


def real_matrices(notes: Notes, part: str, which: str, *, recompute: bool = False) -> list[np.ndarray]:
    """[rank, rank] per router call, in the order of the calls: what `all_to_all_single` got.

    Args:
        which: `sent`: row r is what rank r sent to each; `received`: row r is what it got from each.
    """
    calls = []
    for one in notes:
        # The first exchange of a call dispatches, the second brings the results back.
        dispatches = [s for s in one[part]["splits"] if s["recompute"] is recompute][::2]
        for i, split in enumerate(dispatches):
            if i == len(calls):
                calls.append(np.zeros((len(notes), len(notes)), dtype=np.int64))
            calls[i][one["rank"], one["parallel"]["expert_ranks"]] = split[which]
    return calls


def check_exchange(notes: Notes, expected: dict[str, np.ndarray], part: str) -> None:
    """What is recorded, what was sent and what was received are one matrix, and sum to the assignments."""
    recorded = sent_matrices(notes, part)
    sent, received = (real_matrices(notes, part, which) for which in ("sent", "received"))
    assert len(recorded) == len(sent) == len(received) == len(expected) > 0
    for site, ours, out, into in zip(recorded, recorded.values(), sent, received, strict=True):
        assert ours.tolist() == out.tolist() == into.T.tolist(), site
        assert ours.sum() == expected[site].sum(), site
        assert (ours > 0).any(axis=1).all(), "every rank sends something, or the check is empty"


def check_bytes(notes: Notes, part: str) -> None:
    """Slots x `slot_bytes` is what each call handed to the exchange, to the byte."""
    for one in notes:
        dispatches = [s["bytes"] for s in one[part]["splits"] if not s["recompute"]][::2]
        forward = [s for s in one[part]["samples"] if s["phase"] == "forward"]
        moved = [sum(s["dispatched"] or s["assignments"]) * s["slot_bytes"] for s in forward]
        assert moved == dispatches


def check_untouched(notes: Notes) -> None:
    """The tracer changed no bit, and added no collective to any process group."""
    for one in notes:
        assert one["inference"]["logits_equal"]
        assert one["training"]["equal"]
        assert np.isfinite(one["training"]["loss"])
        for part in ("inference", "training"):
            bare, traced = one[part]["bare"], one[part]["traced"]
            assert bare["collectives"] == traced["collectives"]
            assert bare["events"] == traced["events"]
