"""Writer of PNG files with any color type, bit depth and chunks."""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(
    values: NDArray[Any],
    color: int,
    bits: int,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """Return a PNG of raw values (H, W, channels), written without Pillow; `before` are chunks before the pixels."""
    height, width = values.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b"".join(
        b"\0" + packed_bits(row, bits)
        for top, left, down, right in passes
        for row in values[top::down, left::right]
        if row.size
    )
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, int(interlaced))
    parts = chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")
    return PNG + b"".join(parts)


def packed_bits(row: NDArray[Any], bits: int) -> bytes:
    """Return a row of values of 1 to 16 bits as bytes."""
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    digits = (row.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(-1)).tobytes()
