"""Contract `dense-scores`: `router -> (scores [T, E], logits [T, E])`, scores 0 if not chosen (Llama 4).

The block scales the input of every expert by its scores and runs all of them: E x T rows of FLOPs, regardless
of the choice. The experts receive neither ids nor weights, so only the router is read.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import (
    described,
    expert_modules,
    expert_rows,
    forward_parameters,
    int_attribute,
    unwrapped,
)
from moe_trace.find.contracts.olmoe_mixtral_qwen import router_beside
from moe_trace.find.contracts.overhead_range import overhead_range

_NOTE = "every expert computes every token, scaled by 0 where it was not chosen: FLOPs are those of all"


def find_dense_scores(block: nn.Module) -> list[Found]:
    """Find a block with experts that take hidden states only, and a linear router that has a top-k."""
    children = dict(block.named_children())
    experts = children.pop("experts", None)
    if experts is None or len(forward_parameters(unwrapped(experts))) != 1:
        return []
    inner = unwrapped(experts)
    num_experts = max([len(expert_modules(inner)), *expert_rows(inner)])
    router_name = router_beside(children)
    if router_name is None or num_experts < 2:
        return []
    router = unwrapped(children[router_name])
    top_k = int_attribute(router, "top_k")
    if not isinstance(router, nn.Linear) or not top_k:
        return []
    return [
        Found(
            router=children[router_name],
            router_path=router_name,
            experts=experts,
            block=block,
            num_experts=num_experts,
            top_k=top_k,
            read=partial(read_dense_scores, top_k=top_k),
            every_expert_computes=True,
            notes=(_NOTE,),
        )
    ]


def read_dense_scores(call: Call, top_k: int = 1) -> RouterOutput:
    """Read the k largest scores of each token; a score that underflowed to 0 is a skipped slot."""
    output = call.router_output
    parts = output if isinstance(output, tuple) else ()
    if len(parts) != 2 or not all(isinstance(p, Tensor) and p.dim() == 2 for p in parts):
        raise AdapterMismatch(
            f"expected the router to return (scores [T, E], logits [T, E]), found {described(output)}"
        )
    scores_TE, logits_TE = parts
    if scores_TE.shape != logits_TE.shape:
        raise AdapterMismatch(f"expected scores and logits of one shape, found {described(output)}")
    with overhead_range():
        weights_TK, index_TK = scores_TE.topk(top_k, dim=-1)
    return RouterOutput(index_TK, weights_TK, logits_TE)


DENSE_SCORES = Contract(
    name="dense-scores",
    description="router -> (scores over all experts, logits); experts(hidden_states scaled by the scores)",
    find=find_dense_scores,
    read=read_dense_scores,
    reads_late=True,
)
