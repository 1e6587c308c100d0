"""`CompiledOracle` in separate worker processes.

A worker imports this, by `worker_extension_cls`, before it loads its model."""

from __future__ import annotations

from typing import Any

from engine_run import CompiledOracle

ORACLE = CompiledOracle()


class CompiledOracleWorker:
    """Its methods are called by `collective_rpc`."""

    def oracle_start(self) -> None:
        ORACLE.close()

    def oracle_stop(self) -> dict[str, Any]:
        return ORACLE.close()
