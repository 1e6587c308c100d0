"""The load of every expert as a small picture: for dashboards that show images, with numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable, load_by_step
from moe_trace.data.display.colours import DIVERGING
from moe_trace.data.schema import RoutingSample

CELL_PX, GAP_PX = 14, 1
TOP = 4.0
"""Times an equal share at which the scale ends, the same for every step, so that pictures can be compared."""
LEGEND_PX = 10
_PLACES = (0.0, 0.5, 1.0, (1 + TOP) / 2, TOP)
_COLOURS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DIVERGING], dtype=np.float64)
_PAPER = 255


def load_picture(counts_LE: Sequence[npt.ArrayLike]) -> npt.NDArray[np.uint8]:
    """`[H, W, 3]`: a row per layer from the top, a column per expert from the left.

    White is an equal share, orange is more (the darkest from `TOP` times on), blue is less, and the strip
    at the foot is the scale from 0 to `TOP`. Layers of fewer experts end earlier.
    """
    rows = [np.asarray(counts, dtype=np.float64) for counts in counts_LE]
    width = max(map(len, rows))
    step = CELL_PX + GAP_PX
    picture = np.full((len(rows) * step + LEGEND_PX + GAP_PX, width * step, 3), _PAPER, dtype=np.uint8)
    for i, counts_E in enumerate(rows):
        share = counts_E * (len(counts_E) / max(1.0, counts_E.sum()))
        cells = np.repeat(colours(share), step, axis=0)
        cells[CELL_PX::step] = _PAPER
        picture[i * step : i * step + CELL_PX, : len(cells)] = cells
    picture[-LEGEND_PX:] = colours(np.linspace(0, TOP, picture.shape[1]))
    return picture


def colours(ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """`[N, 3]` colours for multiples of an equal share."""
    channels = [np.interp(ratio, _PLACES, _COLOURS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def step_loads(samples: Sequence[RoutingSample], steps_max: int) -> dict[int, list[npt.NDArray[np.int64]]]:
    """Step -> assignments of each layer in it, for at most that many steps, spread over the recording."""
    calls = CallTable.of(samples)
    calls = calls.take(calls.forward)
    used = [calls.keys[router] for router in np.unique(calls.router).tolist()]
    keys = sorted(used, key=lambda key: (key.layer, key.site))
    steps, loads_SLE = load_by_step(calls, [key.name for key in keys])
    sizes = [int(calls.assignments.sizes[calls.of_router(key.name)].max()) for key in keys]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(steps_max, len(steps))).astype(np.int64))
    return {
        int(steps[i]): [load_E[:size] for load_E, size in zip(loads_SLE[i], sizes, strict=True)]
        for i in chosen
    }
