"""uint8 pixels of shape (N, channels, H, W): their statistics, what becomes of floats, and files that are mapped."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ncfm_core.errors import DatasetError

CHUNK = 1024
"""Images that are counted at once."""


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]: exact, from counts of the 256 values.

    Args:
        images: uint8 of shape (N, channels, H, W), in memory or mapped.

    Returns:
        Two float32 tensors of shape (channels,). A channel of one value has the deviation 1/255: it is divided by.
    """
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].cpu()
        for channel in range(channels):
            counts[channel] += chunk[:, channel].flatten().bincount(minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.to(torch.float32), std.clamp(min=1 / 255).to(torch.float32)


def as_bytes(images: Tensor, name: str) -> Tensor:
    """Images as uint8.

    Args:
        images: uint8, or float in [0, 1].
        name: of the data, for the error.

    Raises:
        DatasetError: a float is NaN, infinite or outside [0, 1], or there are no images.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        message = f"pixels are {images.dtype}, neither uint8 nor float"
        raise DatasetError.of("dataset.name", name, message, "Convert them.")
    bad = (~torch.isfinite(images)).sum().item()
    if bad:
        message = f"{bad} pixels are NaN or infinite"
        raise DatasetError.of("dataset.name", name, message, "Give finite pixels in [0, 1].")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        found = f"[{images.min().item():g}, {images.max().item():g}]"
        message = f"pixels lie in {found}, not in [0, 1]"
        raise DatasetError.of("dataset.name", name, message, "Scale them; do not standardise them.")
    return images.mul(255).round().to(torch.uint8)


def map_pixels(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A raw file of bytes as a tensor that reads it page by page.

    Args:
        path: of the file.
        shape: (N, channels, H, W); their product is the file's size.

    Raises:
        DatasetError: there is no such file here, or it has another size.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != math.prod(shape):
        found = "is not there" if size is None else f"has {size} bytes instead of {math.prod(shape)}"
        hint = "Every node must see the cache folder (NCFM_CACHE_DIR). Delete a damaged one: it is made again."
        raise DatasetError.of("dataset.name", None, f"the converted images {path} {found}", hint)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(shape)
