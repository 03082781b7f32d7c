"""Features of many images without holding what they are made of: each piece is decoded and changed as its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ncfm_core.augment import Augmentation
from ncfm_core.datasets import Dataset
from ncfm_core.execution import Execution, Forward, even_chunks, for_inference
from ncfm_core.pools import Weights, in_bfloat16
from ncfm_core.rng import moved
from ncfm_core.synthetic import decode


@torch.no_grad()
def real_features(
    forward: Forward,
    weights: Weights,
    dataset: Dataset,
    rows: Tensor,
    augmentation: Augmentation,
    execution: Execution,
    *,
    bfloat16: bool,
    channels_last: bool,
) -> Tensor:
    """Features of training images, taken and augmented in the pieces of `even_chunks`.

    Args:
        forward: from weights and images to features.
        weights: of one network.
        dataset: of the images.
        rows: which of them, int64 of shape (n,), on the CPU or where the data are.
        augmentation: of shared parameters.
        execution: how many go through the network at once.
        bfloat16: whether the network computes in bfloat16.
        channels_last: whether images go through it on a GPU in that layout.

    Returns:
        float32 of shape (n, num_features).
    """
    kind = dataset.device.type
    # On a GPU autocast keeps every norm in float32, and converts before and after it: there the network is cast instead.
    cast = bfloat16 and kind == "cuda"
    if cast:
        weights = in_bfloat16(weights)

    def features(piece: Tensor) -> Tensor:
        images = augmentation(dataset.normalise(dataset.take(piece)))
        images = for_inference(images, execution, channels_last=channels_last)
        images = images.to(torch.bfloat16) if cast else images
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bfloat16 and not cast):
            return forward(weights, images).to(torch.float32)

    pieces = even_chunks(moved(rows, dataset.train.index_device), execution.chunk)
    return gathered(map(features, pieces), len(rows))


def decoded_pieces(images: Tensor, factor: int, chunk: int, change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What is made of stored images, in the pieces of `even_chunks`, bit for bit as if all were made at once.

    Args:
        images: stored, shape (n, channels, H, W).
        factor: of the multi-formation.
        chunk: decoded images of a piece, at most.
        change: what is done to decoded images, to each apart from the others (an augmentation of shared parameters).

    Yields:
        Shape (at most chunk, channels, H, W); n * factor^2 in all.
    """
    tiles = factor**2
    for rows in even_chunks(torch.arange(len(images) * tiles), chunk):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        # Never one image alone, whose pixels threads would share and add up in another order.
        first = max(0, min(start // tiles, len(images) - 2))
        last = max(-(-stop // tiles), first + 2)
        yield change(decode(images[first:last], factor))[start - first * tiles : stop - first * tiles]


def gathered(parts: Iterable[Tensor], number: int) -> Tensor:
    """Tensors one behind the other, each written to its place as it comes.

    Args:
        parts: shape (n, ...) each.
        number: of rows in all.

    Returns:
        Shape (number, ...).
    """
    whole, filled = torch.empty(0), 0
    for part in parts:
        if not filled:
            whole = part.new_empty((number, *part.shape[1:]))
        whole[filled : filled + len(part)] = part
        filled += len(part)
    return whole
