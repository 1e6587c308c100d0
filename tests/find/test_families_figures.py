"""Tests of FLOPs and logit metrics of every family, and that only routers are found."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import moe_trace
from families.configs import FAMILIES
from families.dense import DENSE
from families.family import Family
from moe_trace.data.errors import NoRoutersFound
from moe_trace.data.schema import RoutingSample
from traced_families import HONEST, ROUTED, counted, named, record, recorded

torch.set_num_threads(1)

ROUND_THE_EXPERTS = ("fc1_latent_proj", "fc2_latent_proj", "pre_expert_proj", "post_expert_proj")
"""Projections into and out of the experts' own width: dense work, but no experts."""
COMPUTING_OTHERWISE = ("drops-tokens", "skip-is-zero-weight", "identity-experts", "dense-compute")


# --- FLOPs ---


@named(HONEST)
def test_flops_equal_the_counter_to_the_unit(family: Family) -> None:
    seen = recorded(family)
    shared: dict[str, list[int]] = {}
    for truth, flops in zip(seen.truths, counted(family), strict=True):
        sample = seen.of(truth)
        assert (flops.path, flops.call) == (truth.path, truth.call)
        assert sample.router_flops == flops.router
        assert sample.expert_flops == flops.experts
        ours = seen.infos[sample.name].shared_flops_per_token * sample.tokens
        dense = {path: n for path, n in flops.dense.items() if not path.endswith(ROUND_THE_EXPERTS)}
        key = ",".join(dense)
        shared.setdefault(key, [0, sum(dense.values())])[0] += ours
    for path, (ours, expected) in shared.items():
        # Layers without shared experts have the key ""; else a path is one layer's, and its calls add up.
        calls = 1 if "ragged" in family.traits else sum(path == key for key in _shared_keys(family))
        assert ours == (expected * calls if path else 0), path


def _shared_keys(family: Family) -> list[str]:
    return [
        ",".join(path for path in flops.dense if not path.endswith(ROUND_THE_EXPERTS))
        for flops in counted(family)
    ]


@pytest.mark.parametrize(
    "trait", ["drops-tokens", "skip-is-zero-weight", "identity-experts", "dense-compute"]
)
def test_computed_slots_are_not_always_the_assignments(trait: str) -> None:
    for family in [family for family in HONEST if trait in family.traits]:
        samples = recorded(family).samples.values()
        sample = min(samples, key=lambda s: s.assignments.sum() / (s.tokens * s.top_k))  # skips the most
        slots, used = sample.tokens * sample.top_k, int(sample.assignments.sum())
        if trait == "drops-tokens":
            assert sample.computed_slots == used < slots
        elif trait == "skip-is-zero-weight":
            assert used < sample.computed_slots == slots
        elif trait == "identity-experts":
            assert sample.computed_slots < used == slots
        else:
            assert sample.computed_slots == sample.tokens * len(sample.assignments) > used


# --- figures from the logits ---


@named([f for f in HONEST if f.contract != "product-key" and not f.traits & {"probs-not-logits", "hash"}])
def test_logit_figures_equal_numpy(family: Family) -> None:
    seen = recorded(family)
    for truth, logits in zip(seen.truths, seen.logits, strict=True):
        sample = seen.of(truth)
        assert_figures(sample, logits.numpy())
        if "identity-experts" not in family.traits:  # on which no intervention is possible
            probs_TE = logits.softmax(-1)
            mass = sum(float(probs_TE[token, expert]) for token, expert in truth.pairs) / truth.tokens
            assert sample.topk_mass == pytest.approx(mass, rel=1e-5)


def assert_figures(sample: RoutingSample, logits_TE: np.ndarray, *, z_loss: bool = True) -> None:
    top_T1 = logits_TE.max(-1, keepdims=True)
    logsumexp_T = top_T1[:, 0] + np.log(np.exp(logits_TE - top_T1).sum(-1))
    log_probs = logits_TE - logsumexp_T[:, None]
    entropy = -(np.exp(log_probs) * log_probs).sum(-1).mean()
    assert sample.router_entropy == pytest.approx(entropy, rel=1e-5)
    assert sample.confidence == pytest.approx(1 - entropy / np.log(logits_TE.shape[-1]), rel=1e-5, abs=1e-6)
    assert sample.top1_prob == pytest.approx(np.exp(log_probs).max(-1).mean(), rel=1e-5)
    if z_loss:
        assert sample.z_loss == pytest.approx((logsumexp_T**2).mean(), rel=1e-5, abs=1e-9)


@named([f for f in HONEST if "probs-not-logits" in f.traits])
def test_probabilities_are_not_taken_for_logits(family: Family) -> None:
    """Gemma's routers return probabilities; the log of them is its logits, up to a constant per token."""
    model = family.build()
    logits: list[np.ndarray] = []
    for name, module in model.named_modules():
        if name.endswith("router.proj"):
            module.register_forward_hook(lambda m, a, output: logits.append(output.double().detach().numpy()))
    seen = record(family, model, lambda: family.run(model))
    assert len(logits) == len(seen.logits) == len(seen.truths)
    for truth, probabilities, true_logits in zip(seen.truths, seen.logits, logits, strict=True):
        assert_figures(seen.of(truth), probabilities.log().numpy(), z_loss=False)
        assert_figures(seen.of(truth), true_logits)
        assert any("read inside it" in note for note in seen.infos[seen.of(truth).name].notes)


FIGURES = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss")


@named([f for f in HONEST if f.contract == "product-key" or "hash" in f.traits])
def test_no_figures_where_there_are_no_logits(family: Family) -> None:
    seen = recorded(family)
    without = 0
    for sample in seen.samples.values():
        info = seen.infos[sample.name]
        if "TopKRouter" in info.router_class:
            assert sample.router_entropy is not None
            continue
        assert [getattr(sample, figure) for figure in FIGURES] == [None] * len(FIGURES)
        assert sample.nonfinite_tokens == 0
        assert any("entropy, confidence and z-loss are empty" in note for note in info.notes)
        without += 1
    assert without


# --- discovery ---


@named(list(DENSE))
def test_dense_models_and_their_gates_are_left_alone(family: Family) -> None:
    with pytest.raises(
        NoRoutersFound, match=rf"found 0 routers in {family.model}; known adapters: "
    ) as caught:
        moe_trace.find_routers(family.build())
    assert "Nothing in it looks like routed experts: in a dense model there is nothing to trace" in str(
        caught.value
    )


def test_experts_without_a_router_are_named() -> None:
    (family,) = [family for family in FAMILIES if "no-router" in family.traits]
    lacks = "3 modules look like routed experts.*VitPoseBackboneMoeMLP.: no module named gate or router has"
    with pytest.raises(NoRoutersFound, match=lacks):
        moe_trace.find_routers(family.build())


@named(ROUTED)
def test_every_router_of_the_bench_is_found_and_nothing_else(family: Family) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites = moe_trace.find_routers(family.build())
    called = {name for name, _ in recorded(family).samples} if family in HONEST else set()
    assert called <= {site.name for site in sites}
    assert len({site.site for site in sites}) == len(sites), "labels must tell the routers apart"
    for site in sites:
        assert site.info.num_experts > 1
        assert site.info.expert_flops_per_slot > 0
        assert site.info.router_flops_per_token > 0
        assert min(site.info.parameters["router"], site.info.parameters["experts"]) > 0


@named(HONEST)
def test_sizes_are_known_before_a_call(family: Family) -> None:
    """`moe-trace routers` shows them for a model that is never run."""
    seen = recorded(family)
    for sample in seen.samples.values():
        info = seen.infos[sample.name]
        assert (info.num_experts, info.top_k) == (len(sample.assignments), sample.top_k)


@named(ROUTED)
def test_bytes_of_an_expert_add_up_to_those_of_all(family: Family) -> None:
    for info in recorded(family).infos.values():
        assert info.expert_bytes is not None
        rows = 4 * info.parameters["experts"] / info.expert_bytes  # tiny models are of float32
        # Some of the matrices of transformers' LongCat have rows for its identity experts, too.
        assert info.num_experts - info.identity_experts <= rows <= info.num_experts
        assert info.expert_bytes >= 4 * info.expert_flops_per_slot // 2
