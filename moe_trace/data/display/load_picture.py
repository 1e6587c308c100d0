"""Image of the load of every expert, made with numpy alone, for dashboards and notebooks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Blue below and orange above the centre can be distinguished with any colour vision. A page may replace these
# five colours in its dark theme.
DIVERGING = ("#2166AC", "#92C5DE", "#F5F5F5", "#FDB863", "#B35806")
CELL_PX, GAP_PX = 14, 1
TOP = 4.0
"""End of the scale in multiples of an equal share; the same for every step, so that images are comparable."""
LEGEND_PX = 10
_COLOUR_RATIOS = (0.0, 0.5, 1.0, (1 + TOP) / 2, TOP)
_COLOURS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DIVERGING], dtype=np.float64)
_BACKGROUND = 255


def load_picture(counts_LE: Sequence[npt.ArrayLike]) -> npt.NDArray[np.uint8]:
    """Return an image, [H, W, 3]: one row per layer from the top, one column per expert from the left.

    White is an equal share, orange is more (darkest from `TOP` times on), blue is less, and the strip at the
    bottom is the scale from 0 to `TOP`. Rows of layers with fewer experts are shorter.
    """
    rows = [np.asarray(counts, dtype=np.float64) for counts in counts_LE]
    width = max(map(len, rows))
    step = CELL_PX + GAP_PX
    picture = np.full((len(rows) * step + LEGEND_PX + GAP_PX, width * step, 3), _BACKGROUND, dtype=np.uint8)
    for i, counts_E in enumerate(rows):
        share = counts_E * (len(counts_E) / max(1.0, counts_E.sum()))
        cells = np.repeat(colours(share), step, axis=0)
        cells[CELL_PX::step] = _BACKGROUND
        picture[i * step : i * step + CELL_PX, : len(cells)] = cells
    picture[-LEGEND_PX:] = colours(np.linspace(0, TOP, picture.shape[1]))
    return picture


def colours(ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Return the colours, [N, 3], of multiples of an equal share."""
    channels = [np.interp(ratio, _COLOUR_RATIOS, _COLOURS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def png(picture_HW3: npt.NDArray[np.uint8]) -> bytes:
    """Encode the image as PNG."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = picture_HW3.shape
    lines = b"".join(b"\0" + row.tobytes() for row in picture_HW3)  # each starts with filter type 0 (none)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*fields) for fields in chunks)
