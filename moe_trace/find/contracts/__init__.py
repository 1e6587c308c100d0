"""Contracts: how a kind of router is recognised by its modules, and how one of its calls is read.

A contract is two small functions. `find` looks at one module of a model and answers whether a router of
its kind stands there; `read` turns what the hooks saw in one call into a `RouterOutput`. Adding a family is
adding a contract to `CONTRACTS` of `find/registry.py`; a user adds one with `register_adapter`.
"""

from moe_trace.find.contracts.contract import (
    AdapterMismatch,
    Call,
    Contract,
    ExpertRows,
    Found,
    RouterOutput,
)

__all__ = [
    "AdapterMismatch",
    "Call",
    "Contract",
    "ExpertRows",
    "Found",
    "RouterOutput",
]
