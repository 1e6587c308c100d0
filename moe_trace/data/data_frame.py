"""Conversion of tables to pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_trace.data.display.columns import Column
from moe_trace.data.errors import optional_package


def data_frame(rows: Iterable[Any], columns: Mapping[str, Column], feature: str = "to_df()") -> Any:
    """Return a `pandas.DataFrame` of the columns; `attrs["columns"]` describes each one.

    Raises:
        MissingPackage: pandas is not installed.
    """
    pandas = optional_package("pandas", feature, "pandas")
    frame = pandas.DataFrame(rows, columns=list(columns))
    frame.attrs["columns"] = {name: column.described() for name, column in columns.items()}
    return frame
