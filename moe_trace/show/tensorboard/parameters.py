"""Parse a request's parameters; each function raises ValueError for malformed ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Parameters = Mapping[str, str]


def integer(parameters: Parameters, name: str, default: int) -> int:
    """Parse an integer; return the default if the parameter is missing."""
    text = parameters.get(name, "")
    if not text:
        return default
    if not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise ValueError(f"found {name}={text[:40]!r}, expected a whole number")
    return int(text)


def step_range(parameters: Parameters, steps: np.ndarray) -> tuple[int, int]:
    """Return the first and last position in `steps`, by default of all steps."""
    last = len(steps) - 1
    first_given, last_given = integer(parameters, "from", 0), integer(parameters, "to", last)
    if not 0 <= first_given <= last_given <= last:
        raise ValueError(f"found steps {first_given} to {last_given}, expected positions from 0 to {last}")
    return first_given, last_given


def time_window(parameters: Parameters, origin_ns: int, end_ns: int) -> tuple[int, int]:
    """Return (start, end) in ns, clipped to the step; the parameters are in µs since the origin."""
    bounds = []
    for name, default in (("start", 0.0), ("end", (end_ns - origin_ns) / 1000)):
        text = parameters.get(name, "")
        try:
            value = float(text) if text else default
        except ValueError:
            raise ValueError(f"found {name}={text[:40]!r}, expected microseconds") from None
        if not abs(value) < 1e12:
            raise ValueError(f"found {name}={text[:40]!r}, expected microseconds")
        bounds.append(origin_ns + round(value * 1000))
    start, end = max(origin_ns, bounds[0]), min(end_ns, bounds[1])
    return (start, end) if start < end else (origin_ns, end_ns)
