"""Features of many images without holding what they are made of: each piece is decoded and changed as its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ncfm_core.execution import even_chunks
from ncfm_core.synthetic import decode


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
