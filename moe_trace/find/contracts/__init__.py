"""Contracts: how a kind of router is told from its modules, and how one of its calls is read.

A contract is two small functions. `find` looks at one module of a model and answers whether a router of
its kind stands there; `read` turns what the hooks saw in one call into a `Reading`. Adding a family is
adding a contract to `CONTRACTS`; a user adds one with `register_contract`.
"""

from moe_trace.find.contracts.contract import Call, Contract, ContractMismatch, Found, Reading
from moe_trace.find.contracts.registry import CONTRACTS, register_contract, unregister_contract

__all__ = [
    "CONTRACTS",
    "Call",
    "Contract",
    "ContractMismatch",
    "Found",
    "Reading",
    "register_contract",
    "unregister_contract",
]
