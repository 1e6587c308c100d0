"""Records of columns: rows are taken out of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable


class Columns:
    """A dataclass whose arrays, tables of calls and other `Columns` have one row for each thing that it is
    about. What else it holds is of all of them."""

    def select(self, rows: npt.NDArray) -> Self:
        """The rows of a mask or an index."""
        return type(self)(**{name: _taken(value, rows) for name, value in self._values().items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        """All rows of all parts, which hold nothing but arrays."""
        columns = [part._values() for part in parts]
        return cls(**{name: np.concatenate([each[name] for each in columns]) for name in columns[0]})

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def _taken(value: Any, rows: npt.NDArray) -> Any:
    if isinstance(value, CallTable):
        return value.take(rows)
    if isinstance(value, Columns):
        return value.select(rows)
    return value[rows] if isinstance(value, np.ndarray) else value
