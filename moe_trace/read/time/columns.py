"""Records of columns whose rows are selected together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable


class Columns:
    """A dataclass whose arrays, tables of calls and nested `Columns` have one row per item; other fields
    apply to all rows."""

    def select(self, rows: npt.NDArray) -> Self:
        """Select rows by a mask or an index."""
        return type(self)(**{name: _select_rows(value, rows) for name, value in self._values().items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of all parts, which must contain only arrays."""
        columns = [part._values() for part in parts]
        return cls(**{name: np.concatenate([each[name] for each in columns]) for name in columns[0]})

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def _select_rows(value: Any, rows: npt.NDArray) -> Any:
    if isinstance(value, CallTable):
        return value.take(rows)
    if isinstance(value, Columns):
        return value.select(rows)
    return value[rows] if isinstance(value, np.ndarray) else value
