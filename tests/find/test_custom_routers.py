"""Tests of `register_adapter` with custom routers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace
from moe_trace import RouterOutput
from moe_trace.data.errors import NoRoutersFound, UsageError
from moe_trace.find.contracts import Call, Found
from moe_trace.find.registry import CONTRACTS, unregister_adapter
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


def read_titan(call: Call) -> RouterOutput:
    scores, ids, _ = call.router_output
    return RouterOutput(index_TK=ids, weights_TK=scores, logits_TE=call.watched_output)


@pytest.mark.parametrize("contract", ["titan", "router-beside-experts"])
def test_torchtitans_shape(contract: str) -> None:
    """By an adapter, and by its structure alone."""
    torch.manual_seed(0)
    model = nn.Sequential(TitanMoE(), TitanMoE())
    if contract == "titan":
        moe_trace.register_adapter(
            "titan", router=TokenChoiceRouter, experts="experts", watch="gate", read=read_titan
        )
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(x)
    computed = [rows for block in model for rows in block.get_submodule("experts").rows]  # type: ignore[union-attr]
    samples = tracer.samples()
    assert [sample.assignments.tolist() for sample in samples] == computed
    info = tracer.sites[0].info
    assert (info.contract, info.num_experts, info.top_k) == (contract, 6, 2)
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


def read_chooser(call: Call) -> RouterOutput:
    index_TK = call.router_output.unsqueeze(-1)
    return RouterOutput(index_TK, torch.ones_like(index_TK, dtype=torch.float32), None)


@pytest.mark.parametrize("router", [Chooser, "Chooser"])
def test_ten_lines_by_class_or_by_name(router: Any) -> None:
    moe_trace.register_adapter("chooser", router=router, read=read_chooser)
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

    moe_trace.register_adapter("found", find=find, read=read_chooser)
    (site,) = moe_trace.find_routers(HandMade())
    assert (site.name, site.info.expert_flops_per_slot) == ("chooser", 2 * 16)


def test_a_router_whose_experts_nobody_can_count_is_not_misread() -> None:
    moe_trace.register_adapter("chooser", router=Chooser, read=read_chooser)
    tracer = moe_trace.MoETracer(HandMade())
    with torch.no_grad(), tracer, pytest.warns(RuntimeWarning, match="cannot tell the number of experts"):
        tracer.model(torch.randn(9, 4))
    assert tracer.samples() == []
    assert "chooser" in tracer.recording().lost.misread


def test_the_newest_contract_is_asked_first_and_can_be_taken_back() -> None:
    moe_trace.register_adapter("first", router=Chooser, read=read_chooser)
    moe_trace.register_adapter("second", router=Chooser, read=read_chooser)
    assert [site.info.contract for site in moe_trace.find_routers(HandMade())] == ["second"]
    unregister_adapter("second")
    assert [site.info.contract for site in moe_trace.find_routers(HandMade())] == ["first"]
    unregister_adapter("first")
    with pytest.raises(NoRoutersFound):
        moe_trace.find_routers(HandMade())


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="'topk-experts' is already registered"):
        moe_trace.register_adapter("topk-experts", router=Chooser, read=read_chooser)
    with pytest.raises(UsageError, match="found both or neither"):
        moe_trace.register_adapter("mine", read=read_chooser)
    with pytest.raises(UsageError, match="found both or neither"):
        moe_trace.register_adapter("mine", router=Chooser, find=lambda module: [], read=read_chooser)
    with pytest.raises(UsageError, match="no adapter named 'mine'; known are one-hot"):
        unregister_adapter("mine")


# --- a gate and a list of experts, in one module ---


class OwnMoE(nn.Module):
    """The shortest way to write one: a Linear gate, a ModuleList, a loop."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def of_logits(logits: Tensor) -> RouterOutput:
    weights, ids = logits.softmax(-1).topk(2)
    return RouterOutput(index_TK=ids, weights_TK=weights, logits_TE=logits)


def own_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OwnMoE(), nn.Linear(32, 32), OwnMoE())


def recorded(path: Path, model: nn.Module) -> moe_trace.Summary:
    with torch.no_grad(), moe_trace.profile(model, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        model(torch.randn(64, 32))
    prof.export_chrome_trace(str(path))
    return moe_trace.read_summary(path)


def found_gate(module: nn.Module) -> list[Found]:
    if not isinstance(module, OwnMoE):
        return []
    parts = {"router": module.gate, "router_path": "gate", "experts": None, "block": module}
    return [Found(**parts, num_experts=4, top_k=2)]


TOLD_RIGHT: dict[str, dict[str, Any]] = {
    "found by a function": {"find": found_gate},
    "block by its class": {"block": OwnMoE, "router": "gate"},
    "block by its name": {"block": "OwnMoE", "router": "gate"},
    "gate by torch's class": {"router": nn.Linear},
    "gate and list of experts": {"router": nn.Linear, "experts": "experts"},
}


@pytest.mark.parametrize("how", TOLD_RIGHT)
def test_the_experts_of_an_moe_of_ones_own_are_timed_and_counted(how: str, tmp_path: Path) -> None:
    moe_trace.register_adapter("own", read=lambda call: of_logits(call.router_output), **TOLD_RIGHT[how])
    summary = recorded(tmp_path / "a.json", own_model())
    assert [router.info.name for router in summary.routers] == ["0.gate", "2.gate"]
    for router in summary.routers:
        info = router.info
        assert (info.num_experts, info.expert_flops_per_slot, info.notes) == (4, 2 * 32 * 32, ())
        assert router.flops.router == 2 * 32 * 4 * 64 and router.flops.experts == 2 * 32 * 32 * 2 * 64
    forward = summary.phases.total.forward  # type: ignore[attr-defined]
    assert forward["experts"].host_us > 0 and forward["router"].host_us > 0
    assert "experts_untimed" not in {finding.rule for finding in summary.findings}  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["router", "find"])
def test_an_adapter_that_hides_the_experts_is_told_so(way: str, tmp_path: Path) -> None:
    """The whole MoE taken for its router: 100 % router, 0 % experts, and why."""

    def find(module: nn.Module) -> list[Found]:
        if not isinstance(module, OwnMoE):
            return []
        parts = {"router": module, "router_path": "", "experts": None, "block": None}
        return [Found(**parts, num_experts=4, top_k=2, watched=module.gate)]

    how: dict[str, Any] = {"router": OwnMoE, "watch": "gate"} if way == "router" else {"find": find}
    moe_trace.register_adapter("own", read=lambda call: of_logits(call.watched_output), **how)
    summary = recorded(tmp_path / "a.json", own_model())
    [finding] = [f for f in summary.findings if f.rule == "experts_untimed"]  # type: ignore[attr-defined]
    assert summary.findings[0] == finding and finding.sites == ("L00", "L02")  # type: ignore[attr-defined]
    assert "experts 0 %" in finding.sentence and 'block=MyMoE, router="gate"' in finding.advice
    notes = " ".join(summary.notes)
    assert ("OwnMoE, which holds its experts (experts)" in notes) == (way == "router")
    assert "work on every token too" not in notes


def test_a_block_needs_the_path_of_its_router() -> None:
    with pytest.raises(UsageError, match="expected router= as a path inside block="):
        moe_trace.register_adapter("own", block=OwnMoE, read=read_chooser)


def test_older_names_work_and_warn() -> None:
    with pytest.warns(
        DeprecationWarning, match="moe_trace.register_contract is now moe_trace.register_adapter"
    ):
        assert moe_trace.register_contract is moe_trace.register_adapter
    with pytest.warns(DeprecationWarning, match="moe_trace.RouterOutput"):
        assert moe_trace.Reading is RouterOutput


def test_the_documented_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    program = "\n".join(blocks)
    exec(compile(program, str(DOCUMENT), "exec"), {"__name__": "documented"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0.router", "1.router"]
    for line in lines:
        counts = [int(n) for n in re.findall(r"\d+", line.partition("[")[2].partition("]")[0])]
        assert sum(counts) == 32 * 2
        assert line.endswith("nats")
