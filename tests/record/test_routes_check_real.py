"""Tests that the check passes routes of a real model on real text, and finds faults planted in them."""

from __future__ import annotations

import inspect

import torch

import moe_trace
from moe_trace.data.routes import columns
from moe_trace.demo import load_demo_model
from moe_trace.read.routes.check import check_routes


def test_the_demo_models_routes_raise_no_alarm_until_a_row_is_stale() -> None:
    model, tokenizer = load_demo_model()
    text = inspect.getsource(columns)
    inputs = tokenizer([text[:1000], text[1000:1400]], return_tensors="pt", padding=True)
    with torch.no_grad(), moe_trace.MoETracer(model, routes=True) as tracer:
        model(**inputs)
        model.generate(inputs["input_ids"][:1, :100], max_new_tokens=20, do_sample=False)
    routes = tracer.routes()
    assert len(routes) > 2000
    assert not any(check_routes(routes).values())
    routes.expert_ids[200:260] = routes.expert_ids[199]
    found = check_routes(routes)["rows_are_their_own"]
    assert [problem.count for problem in found if problem.first.startswith("row 200,")] and found[
        0
    ].count >= 60
