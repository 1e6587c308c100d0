"""Options of a tracer, as stored in its recording."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_trace.data.errors import UsageError
from moe_trace.find.routers import LayerSelector


@dataclass(frozen=True)
class TracerOptions:
    """The arguments of `MoETracer` that are stored in the recording.

    Raises:
        UsageError: one of the numbers is out of range.
    """

    layers: LayerSelector
    every: int
    warmup: int
    capacity: int
    capacity_bytes: int

    def __post_init__(self) -> None:
        minimums = {"every": 1, "warmup": 0, "capacity": 1, "capacity_bytes": 1}
        if any(getattr(self, name) < value for name, value in minimums.items()):
            expected = ", ".join(f"{name} >= {value}" for name, value in minimums.items())
            found = ", ".join(f"{name}={getattr(self, name)}" for name in minimums)
            raise UsageError(f"expected {expected}; found {found}")

    def as_recorded(self) -> dict[str, Any]:
        """Return the options in JSON-compatible form, with the name of a layer predicate in its place."""
        layers = self.layers
        if callable(layers):
            described: Any = getattr(layers, "__name__", "predicate")
        else:
            described = None if layers is None else list(layers)
        return {**asdict(self), "layers": described}
