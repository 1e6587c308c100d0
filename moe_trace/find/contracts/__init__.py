"""Contracts, each of which recognizes a kind of router by its modules and reads its calls.

A contract consists of two small functions. `find` inspects one module of a model and returns the routers of
its kind there; `read` turns the arguments and outputs seen by hooks in one call into a `RouterOutput`. To
support a family, add a contract to `CONTRACTS` in `find/registry.py`; users add one by `register_adapter`.
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
