"""Placement plans, which map each slot of each rank to an expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.errors import UsageError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """R ranks on N nodes; ranks r·R/N to (r + 1)·R/N - 1 are on node r."""

    ranks: int
    nodes: int = 1

    def __post_init__(self) -> None:
        """Check that the nodes divide the ranks.

        Raises:
            UsageError: A number is below 1, or the nodes do not divide the ranks.
        """
        if self.ranks < 1 or self.nodes < 1:
            raise UsageError(
                f"found {self.ranks} ranks on {self.nodes} nodes, expected 1 or more of each; give --ranks "
                "and --nodes as whole numbers above 0"
            )
        if self.ranks % self.nodes:
            raise UsageError(
                f"found {self.ranks} ranks on {self.nodes} nodes, expected the same number of ranks on every "
                f"node; choose --nodes from {divisors(self.ranks)}"
            )

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.ranks // self.nodes


@dataclass(frozen=True)
class Plan:
    """Experts by slot. Rank r holds slots r·P/R to (r + 1)·P/R - 1 of each layer."""

    name: str
    cluster: Cluster
    num_experts: int
    experts_LP: Ints
    """Physical to logical: the expert in each slot."""

    @property
    def slots_per_rank(self) -> int:
        """Number of slots of each rank, P / R."""
        return int(self.experts_LP.shape[1]) // self.cluster.ranks

    def copies_LER(self) -> Ints:
        """Return the number of copies of each expert on each rank."""
        layers, slots = self.experts_LP.shape
        copies = np.zeros((layers, self.num_experts, self.cluster.ranks), np.int64)
        rank_P = np.arange(slots) // self.slots_per_rank
        np.add.at(copies, (np.arange(layers)[:, None], self.experts_LP, rank_P[None]), 1)
        return copies

    def shares_LER(self) -> Floats:
        """Return the fraction of an expert's load on each rank; its copies share the load equally."""
        copies = self.copies_LER()
        return copies / copies.sum(axis=2, keepdims=True)


def contiguous_plan(layers: int, num_experts: int, cluster: Cluster) -> Plan:
    """Give rank r the experts r·E/R to (r + 1)·E/R - 1, the default of expert parallelism.

    Raises:
        UsageError: The ranks do not divide the experts.
    """
    if num_experts % cluster.ranks:
        raise UsageError(
            f"found {cluster.ranks} ranks for {num_experts} experts, expected the same number of experts on "
            f"every rank; choose --ranks from {divisors(num_experts)}"
        )
    return Plan("contiguous", cluster, num_experts, np.tile(np.arange(num_experts), (layers, 1)))


def divisors(number: int) -> str:
    """Return all divisors as text, such as `1, 2, 4, 8`."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
