"""The synthetic set: what is learned, how it starts and how it decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm_core.datasets import Dataset

GRID_SCALE_TO = 64
"""Pixels that a stored image is enlarged to, at least, in a grid."""
PREVIEW_IMAGES = 10
"""Stored images of each class that a preview shows."""


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """Stored images, sorted by class.

    `images`: float32 of shape (C * ipc, channels, H, W) in [0, 1]. `labels`: int64 of shape (C * ipc,). Each stored image holds
    factor x factor tiles (multi-formation, as in IDC arXiv 2205.14959 and IDM), each of which decodes to a full-size image.
    """

    images: Tensor
    labels: Tensor
    factor: int
    soft_labels: Tensor | None = None
    """Logits of the teachers for the decoded images, float32 of shape (C * ipc * factor^2, C); None for hard labels alone."""

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def ipc(self) -> int:
        """Stored images per class."""
        return len(self.labels) // self.num_classes

    def decode(self) -> tuple[Tensor, Tensor]:
        """The training images and their labels, still sorted by class.

        Returns:
            Images of shape (C * ipc * factor^2, channels, H, W), labels of shape (C * ipc * factor^2,). The tiles of a stored
            image follow each other: top left, top right, bottom left, bottom right.
        """
        return decode(self.images, self.factor), self.labels.repeat_interleave(self.factor**2)

    def grid(self) -> Tensor:
        """A picture of the stored images, uint8 of shape (channels, height, width).

        One row a class; a set of one image per class stands in one row.
        """
        images = self.images.unflatten(0, (self.num_classes, self.ipc))
        return _picture(images.transpose(0, 1) if self.ipc == 1 else images)

    def preview(self) -> Tensor:
        """Like `grid`, of the first images of each class, each class's stored ones followed by what they decode to."""
        classes = self.images.unflatten(0, (self.num_classes, self.ipc))[:, :PREVIEW_IMAGES]
        if self.factor > 1:
            decoded = decode(classes.flatten(0, 1), self.factor).unflatten(0, (self.num_classes, -1))
            classes = torch.cat((classes, decoded), dim=1)
        return _picture(classes.transpose(0, 1) if self.ipc == 1 else classes)


def _picture(images: Tensor) -> Tensor:
    """Images of shape (rows, columns, channels, H, W) in [0, 1] in a frame, enlarged, uint8 of shape (channels, ..., ...)."""
    rows, columns, channels, height, _ = images.shape
    enlarge = -(-GRID_SCALE_TO // height)
    pixels = images.detach().flatten(0, 1).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
    pixels = pixels.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    pixels = F.pad(pixels, (1, 1, 1, 1), value=128)
    high, wide = pixels.shape[2:]
    placed = pixels.view(rows, columns, channels, high, wide).permute(2, 0, 3, 1, 4)
    return placed.reshape(channels, rows * high, columns * wide)


def tiles(size: int, factor: int) -> list[tuple[int, int]]:
    """Start and end of each of `factor` tiles along `size` pixels; the earlier ones get what does not divide."""
    edges = [-(-size * i // factor) for i in range(factor + 1)]
    return list(pairwise(edges))


def decode(images: Tensor, factor: int) -> Tensor:
    """Cut every image into factor x factor tiles and enlarge each bilinearly to the full size; differentiable.

    Args:
        images: shape (N, channels, H, W).
        factor: tiles along each side; 1 gives the images themselves.

    Returns:
        Shape (N * factor^2, channels, H, W); the tiles of an image follow each other, row by row.
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    enlarged = [
        F.interpolate(images[:, :, top:bottom, left:right], (height, width), mode="bilinear", align_corners=False)
        for top, bottom in tiles(height, factor)
        for left, right in tiles(width, factor)
    ]
    return torch.stack(enlarged, dim=1).flatten(0, 1)


def encode(images: Tensor, factor: int) -> Tensor:
    """Put factor x factor full-size images into one, each shrunk to its tile: what `decode` takes apart.

    Args:
        images: shape (N * factor^2, channels, H, W), in the order of `decode`.
        factor: tiles along each side.

    Returns:
        Shape (N, channels, H, W).
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    groups = images.unflatten(0, (-1, factor**2))
    rows = []
    for i, (top, bottom) in enumerate(tiles(height, factor)):
        row = [
            F.interpolate(
                groups[:, i * factor + j],
                (bottom - top, right - left),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            )
            for j, (left, right) in enumerate(tiles(width, factor))
        ]
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def start(
    dataset: Dataset, *, ipc: int, factor: int, init: Literal["noise", "real", "tiled"], draw: torch.Generator
) -> SyntheticSet:
    """The set at step 0, on the data's device.

    Args:
        dataset: the real data.
        ipc: stored images per class.
        factor: of the multi-formation.
        init: `noise` is N(1/2, 1/4) clamped to [0, 1]; `real` takes random real images as they are; `tiled` shrinks one into
            each tile.
        draw: generator on the CPU.
    """
    labels = torch.arange(dataset.num_classes, device=dataset.device).repeat_interleave(ipc)
    if init == "noise":
        images = torch.randn((len(labels), *dataset.image_shape), generator=draw).mul_(0.25).add_(0.5).clamp_(0, 1)
        return SyntheticSet(images.to(dataset.device), labels, factor)
    shrink = factor if init == "tiled" else 1
    wanted = ipc * shrink**2
    # A class with fewer images than tiles gives some of them twice.
    chosen = dataset.class_batches(min(wanted, min(dataset.class_counts)), draw)
    chosen = chosen.repeat(1, -(-wanted // chosen.shape[1]))[:, :wanted].flatten().to(dataset.device)
    images = dataset.take(chosen).to(torch.float32).div(255)
    return SyntheticSet(encode(images, shrink).clamp(0, 1).contiguous(), labels, factor)


def to_state(synthetic: SyntheticSet) -> dict[str, Tensor]:
    """As flat tensors on the CPU: images, labels, factor and, where there are any, soft_labels."""
    state = {"images": synthetic.images, "labels": synthetic.labels, "factor": torch.tensor(synthetic.factor)}
    if synthetic.soft_labels is not None:
        state["soft_labels"] = synthetic.soft_labels
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def from_state(state: Mapping[str, Tensor]) -> SyntheticSet:
    """What `to_state` gave."""
    return SyntheticSet(state["images"], state["labels"], int(state["factor"]), state.get("soft_labels"))
