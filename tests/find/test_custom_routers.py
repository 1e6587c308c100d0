"""`register_contract`: routers that only their author knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace
from moe_trace import Reading
from moe_trace.data.errors import NoRoutersFound, UsageError
from moe_trace.find.contracts import CONTRACTS, Call, Found, unregister_contract
from paths import ROOT

DOCUMENT = ROOT / "docs" / "custom_routers.md"


@pytest.fixture(autouse=True)
def contracts_as_before() -> Iterator[None]:
    before = list(CONTRACTS)
    yield
    CONTRACTS[:] = before


# --- of torchtitan's shape: scores, ids and counts from the router; sorted rows for the experts ---


class TokenChoiceRouter(nn.Module):
    """x [T, D] -> scores [T, K], expert ids [T, K], tokens per expert [E]."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores_TE = torch.sigmoid(self.gate(x).float())
        _, ids_TK = (scores_TE + expert_bias).topk(self.top_k, dim=-1)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        return scores_TE.gather(-1, ids_TK), ids_TK, counts_E


class GroupedExperts(nn.Module):
    """Rows sorted by expert [N, D], tokens per expert [E] -> [N, D]."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.randn(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.randn(num_experts, hidden, dim))
        self.rows: list[list[int]] = []

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        sizes = num_tokens_per_expert.int().tolist()
        self.rows.append(sizes)
        parts = [
            (torch.nn.functional.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T
            for rows, w1, w2, w3 in zip(x.split(sizes), self.w1, self.w2, self.w3, strict=True)
        ]
        return torch.cat(parts)


class TitanMoE(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 12, num_experts: int = 6, top_k: int = 2) -> None:
        super().__init__()
        self.router = TokenChoiceRouter(dim, num_experts, top_k)
        self.experts = GroupedExperts(dim, hidden, num_experts)
        self.shared_experts = nn.Linear(dim, dim, bias=False)
        self.register_buffer("expert_bias", torch.randn(num_experts) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, ids, counts = self.router(flat, self.expert_bias)
        order = ids.flatten().argsort(stable=True)
        rows = flat[order // self.router.top_k]
        out = self.experts(rows, counts) * scores.flatten()[order, None]
        return (self.shared_experts(flat).index_add(0, order // self.router.top_k, out)).view_as(x)


def read_titan(call: Call) -> Reading:
    scores, ids, _ = call.router_output
    return Reading(index_TK=ids, weights_TK=scores, logits_TE=call.watched_output)


def test_torchtitans_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TitanMoE(), TitanMoE())
    with pytest.raises(NoRoutersFound, match="GroupedExperts, called as \\(x, num_tokens_per_expert\\)"):
        moe_trace.find_routers(model)
    moe_trace.register_contract(
        "titan", router=TokenChoiceRouter, experts="experts", watch="gate", read=read_titan
    )
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(x)
    computed = [rows for block in model for rows in block.get_submodule("experts").rows]  # type: ignore[union-attr]
    samples = tracer.samples()
    assert [sample.assignments.tolist() for sample in samples] == computed
    info = tracer.sites[0].info
    assert (info.contract, info.num_experts, info.top_k) == ("titan", 6, 2)
    assert samples[0].expert_flops == 2 * 3 * 8 * 12 * 20
    assert samples[0].router_flops == 2 * 8 * 6 * 10
    assert info.shared_flops_per_token == 2 * 8 * 8
    assert info.parameters == {"router": 48, "experts": 6 * 3 * 96, "shared": 64}
    logits = model[0].router.gate(x.view(-1, 8))  # type: ignore[union-attr,operator]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert samples[0].router_entropy == pytest.approx(entropy, rel=1e-5)


# --- written by hand ---


class Chooser(nn.Module):
    def __init__(self, **attributes: int) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).argmax(-1)


class HandMade(nn.Module):
    def __init__(self, **attributes: int) -> None:
        super().__init__()
        self.chooser = Chooser(**attributes)
        self.workers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        ids = self.chooser(x)
        return torch.stack([self.workers[int(i)](row) for i, row in zip(ids, x, strict=True)])


def read_chooser(call: Call) -> Reading:
    index_TK = call.router_output.unsqueeze(-1)
    return Reading(index_TK, torch.ones_like(index_TK, dtype=torch.float32), None)


@pytest.mark.parametrize("router", [Chooser, "Chooser"])
def test_ten_lines_by_class_or_by_name(router: Any) -> None:
    moe_trace.register_contract("chooser", router=router, read=read_chooser)
    model = HandMade(num_experts=3, top_k=1)
    x = torch.randn(9, 4)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(x)
    (sample,) = tracer.samples()
    assert sample.assignments.tolist() == torch.bincount(model.chooser(x), minlength=3).tolist()
    assert (sample.router_entropy, sample.z_loss, sample.skipped) == (None, None, 0)


def test_a_find_function_of_ones_own() -> None:
    def find(module: nn.Module) -> list[Found]:
        if not isinstance(module, HandMade):
            return []
        parts = {"router": module.chooser, "router_path": "chooser", "experts": None, "block": module}
        return [Found(**parts, num_experts=3, top_k=1, weights=(module.workers,))]

    moe_trace.register_contract("found", find=find, read=read_chooser)
    (site,) = moe_trace.find_routers(HandMade())
    assert (site.name, site.info.expert_flops_per_slot) == ("chooser", 2 * 16)


def test_a_router_whose_experts_nobody_can_count_is_not_misread() -> None:
    moe_trace.register_contract("chooser", router=Chooser, read=read_chooser)
    tracer = moe_trace.MoETracer(HandMade())
    with torch.no_grad(), tracer, pytest.warns(RuntimeWarning, match="cannot tell the number of experts"):
        tracer.model(torch.randn(9, 4))
    assert tracer.samples() == []
    assert "chooser" in tracer.recording().lost.misread


def test_the_newest_contract_is_asked_first_and_can_be_taken_back() -> None:
    moe_trace.register_contract("first", router=Chooser, read=read_chooser)
    moe_trace.register_contract("second", router=Chooser, read=read_chooser)
    assert [site.info.contract for site in moe_trace.find_routers(HandMade())] == ["second"]
    unregister_contract("second")
    assert [site.info.contract for site in moe_trace.find_routers(HandMade())] == ["first"]
    unregister_contract("first")
    with pytest.raises(NoRoutersFound):
        moe_trace.find_routers(HandMade())


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="'topk-experts' is already registered"):
        moe_trace.register_contract("topk-experts", router=Chooser, read=read_chooser)
    with pytest.raises(UsageError, match="found both or neither"):
        moe_trace.register_contract("mine", read=read_chooser)
    with pytest.raises(UsageError, match="found both or neither"):
        moe_trace.register_contract("mine", router=Chooser, find=lambda module: [], read=read_chooser)
    with pytest.raises(UsageError, match="no contract named 'mine'; known are one-hot"):
        unregister_contract("mine")


def test_the_documented_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(program, str(DOCUMENT), "exec"), {"__name__": "documented"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0.router", "1.router"]
    for line in lines:
        counts = [int(n) for n in re.findall(r"\d+", line.partition("[")[2].partition("]")[0])]
        assert sum(counts) == 32 * 2
        assert line.endswith("nats")
