"""Tests of expert load dumps in the format of SGLang's `eplb/expert_distribution.py`; not run on SGLang."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_trace.cli import main
from moe_trace.data.errors import UsageError
from moe_trace.data.routes.reader import read_routes
from moe_trace.integrations.sglang.dumps import counts_of_dump, routes_of_dump

LAYERS, EXPERTS, SLOTS, TOP_K = 3, 4, 6, 2
SLOT_MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3], [3, 2, 1, 0, 3, 3]])


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def stat_dump(path: Path) -> np.ndarray:
    """A ring of 8 steps of which 5 are written; layer 0 is dense."""
    counts = torch.zeros(8, LAYERS, EXPERTS, dtype=torch.int32)
    counts[:5, 1:] = torch.randint(1, 50, (5, LAYERS - 1, EXPERTS), dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
    return counts[:5].numpy()


def token_dump(path: Path, **changed: Any) -> list[torch.Tensor]:
    """Two forwards of a rank, of 5 and 3 tokens; layer 0 is dense, 8 columns of which 2 are used."""
    records, passed = [], []
    for forward, tokens in enumerate((5, 3)):
        ids = torch.full((LAYERS, tokens, 8), -1, dtype=torch.int32)
        ids[1:, :, :TOP_K] = torch.rand(LAYERS - 1, tokens, SLOTS).argsort(-1)[..., :TOP_K].int()
        ids[:, -1] = -1  # padding
        count = torch.stack([torch.bincount(layer[layer >= 0].long(), minlength=SLOTS) for layer in ids])
        passed.append(ids)
        records.append(
            {
                "forward_pass_id": forward + 10,
                "rank": 1,
                "gatherer_key": "primary",
                "input_ids": list(range(100, 100 + tokens)),
                "positions": list(range(tokens)),
                "extend_seq_lens": [tokens],
                "forward_mode": 1,
                "topk_ids_of_layer": ids,
                "misc_objects": [],
                "global_physical_count": count.int(),
            }
        )
        for name, change in changed.items():
            records[-1][name] = change
    torch.save({"records": records, "last_physical_to_logical_map": SLOT_MAP}, path)
    return passed


def logical(ids: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.where(ids[layer] < 0, -1, SLOT_MAP[layer][ids[layer].clamp(min=0).long()])


def test_counts_of_the_mode_stat(tmp_path: Path) -> None:
    expected = stat_dump(tmp_path / "a.pt")
    assert np.array_equal(counts_of_dump(tmp_path / "a.pt"), expected)


def test_counts_by_slot_are_added_up_by_expert(tmp_path: Path) -> None:
    passed = token_dump(tmp_path / "a.pt")
    found = counts_of_dump(tmp_path / "a.pt")
    for counts, ids in zip(found, passed, strict=True):
        for layer in range(LAYERS):
            of_layer = logical(ids, layer)
            assert (
                counts[layer].tolist() == torch.bincount(of_layer[of_layer >= 0], minlength=EXPERTS).tolist()
            )


@pytest.mark.parametrize("as_json", [True, False])
def test_placement_reads_a_dump_as_it_reads_an_array(as_json: bool, tmp_path: Path) -> None:
    """The same plans."""
    counts = stat_dump(tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", counts)
    given = tmp_path / "a.pt"
    if as_json:  # as the server is given it, --init-expert-location
        given = tmp_path / "a.json"
        given.write_text(json.dumps({"logical_count": counts.tolist()}))
    code, out, err = run("placement", given, "--ranks", 2, "--format", "json")
    assert code == 0, err
    plain = json.loads(run("placement", tmp_path / "a.npy", "--ranks", 2, "--format", "json")[1])
    found = json.loads(out)
    assert found["clusters"] == plain["clusters"] and found["judged_observations"] == 5
    assert found["clusters"][0]["plans"][0]["max_over_mean"][0][0] is None, "layer 0 is dense"
    assert run("placement", given, "--ranks", 2, "--layer", 2)[0] == 0


def test_routes_of_the_mode_per_token(tmp_path: Path) -> None:
    passed = token_dump(tmp_path / "a.pt")
    code, _, err = run("routes", "import", tmp_path / "a.pt", "--out", tmp_path / "a.routes.npz")
    assert code == 0 and "slots are taken to experts" in err
    routes = read_routes(tmp_path / "a.routes.npz")
    assert routes.layers == ("layers.1", "layers.2") and routes.expert_ids.shape == (8, 2, TOP_K)
    assert routes.padding.tolist() == [False] * 4 + [True] + [False] * 2 + [True]
    for row, layer in enumerate((1, 2)):
        expected = torch.cat([logical(ids, layer)[:, :TOP_K] for ids in passed])
        kept = ~routes.padding
        assert np.array_equal(routes.expert_ids[kept, row], expected.numpy()[kept])
    assert routes.token_ids is not None and routes.token_ids.tolist() == [*range(100, 105), *range(100, 103)]
    assert routes.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert routes.forward.tolist() == [10] * 5 + [11] * 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 cut off",
        {"records": [], "last_physical_to_logical_map": SLOT_MAP},
        {"records": [{"global_physical_count": torch.ones(2, 2)}], "last_physical_to_logical_map": SLOT_MAP},
        {"records": [{"global_physical_count": torch.ones(2, 2).int()}]},
        {"logical_count": torch.zeros(2, 3, 4, dtype=torch.int32)},
        {"logical_count": [[1, 2]]},
        {"weights": torch.ones(3)},
        torch.ones(3),
    ],
    ids=str,
)
def test_what_is_no_dump_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UsageError, match=r"a\.pt: "):
        counts_of_dump(path)
    code, _, err = run("placement", path)
    assert code != 0 and "Traceback" not in err
    with pytest.raises(UsageError, match=r"a\.pt: "):
        routes_of_dump(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"topk_ids_of_layer": torch.full((LAYERS, 3, 8), SLOTS, dtype=torch.int32)},
        {"topk_ids_of_layer": torch.zeros(LAYERS + 1, 3, 8, dtype=torch.int32)},
        {"input_ids": [1]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_ids_that_do_not_fit_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    token_dump(tmp_path / "a.pt", **changed)
    with pytest.raises(UsageError, match=r"a\.pt: found"):
        routes_of_dump(tmp_path / "a.pt")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_a_dump_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"logical_count": Harm()}, "a.pt")
    with pytest.raises(UsageError):
        counts_of_dump("a.pt")
    assert not Path("harm").exists()
