"""The IDX files of MNIST and its like, as they are or with gzip around them."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ncfm_core.errors import DatasetError, Problem

BYTES = 8
"""Code of unsigned bytes in a header."""
MAX_BYTES = 1 << 32
"""Of what a file may hold: a bound on what a small one may unpack to."""


def present(path: Path, *, compressed: bool) -> bool:
    """Whether a file is there, or, where that will do, the same with `.gz`."""
    return path.exists() or (compressed and _zipped(path).exists())


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file; the plain one where both are there.

    Args:
        path: without `.gz`.
        dimensions: that it must have.

    Returns:
        uint8, of the shape in its header.

    Raises:
        DatasetError: it is cut off, damaged or no such file.
    """
    is_plain = path.exists()
    path = path if is_plain else _zipped(path)
    try:
        with path.open("rb") if is_plain else gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"it ends in its header, after {len(header)} bytes")
            if header[:4] != bytes((0, 0, BYTES, dimensions)):
                raise ValueError(f"it does not begin like an IDX file of bytes with {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise ValueError(f"its header promises {size} bytes")
            data = file.read(size + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error) or type(error).__name__
    else:
        if len(data) == size:
            return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)
        promised = f"its header promises {'x'.join(map(str, shape))} = {size} bytes"
        reason = f"{promised}, and {f'{len(data)} follow' if len(data) < size else 'more follow'}"
    hint = "It is cut off, damaged or another file: fetch it again."
    # The whole path: its end is what matters.
    raise DatasetError(Problem("dataset.name", repr(str(path)), f"cannot be read: {reason}", hint))


def _zipped(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")
