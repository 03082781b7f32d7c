"""From image files to uint8 pixels of one size: PNG, JPEG, WebP, BMP and GIF, through Pillow."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ncfm_core.errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Of files that are taken as images, in any case of letters."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""The only decoders that a file is ever given to."""
MAX_PIXELS = 1 << 27
"""Of one image as stored: a bound on what a small file may decode to."""
MAX_THREADS = 8
CHANNELS = 3
"""Everything becomes RGB, so that grey and colour files may stand side by side."""
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)


def decode(data: bytes, name: str, image_size: int) -> np.ndarray:
    """One image file as pixels.

    Its EXIF orientation is applied; transparency is laid over white; 16 bit grey keeps its upper 8 bits; of an animation the
    first frame counts. The shorter side is then scaled to the size, bilinearly and with antialiasing, and the middle cut out.

    Args:
        data: the file.
        name: for the error.
        image_size: height and width of the result.

    Returns:
        uint8 of shape (3, image_size, image_size).

    Raises:
        DatasetError: the file is damaged or has too many pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd but readable metadata; what matters raises
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            square = _rgb(ImageOps.exif_transpose(image))
    except (*_DAMAGED, Image.DecompressionBombError, zlib.error) as error:
        reason = _reason(error, data)
        hint = "Mend or remove that file."
        raise DatasetError.of("dataset", name, f"the image cannot be read: {reason}", hint) from None
    width, height = square.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if square.size != (image_size, image_size):
        box = (left, top, left + side, top + side)
        square = square.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square).transpose(2, 0, 1)


def _reason(error: Exception, data: bytes) -> str:
    """What is wrong with a file, in words for the person who has it."""
    from PIL import UnidentifiedImageError

    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own message names the buffer that it was given.
        return f"its {len(data)} bytes are not a PNG, JPEG, WebP, BMP or GIF, or the beginning of it is damaged"
    return str(error) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")


def decode_all(files: Iterable[tuple[str, bytes]], image_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Many files on a few threads, in the order in which they come.

    Args:
        files: name and content; only a few are held at once.
        image_size: height and width of the results.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name, data in files:
                waiting.append((name, pool.submit(decode, data, name, image_size)))
                if len(waiting) > 4 * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
