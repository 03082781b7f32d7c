"""Counted randomness: every draw has its own generator, made from (seed, stream, step), so that there is no state to save.

Draws are made on the CPU and moved, so that a seed means the same on every device; but for the millions of normals behind
frequencies, which a GPU draws itself: for them the CPU would take longer than the GPU for the rest of the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, stream: str, step: int = 0, device: torch.device | None = None) -> torch.Generator:
    """The generator of one draw.

    Args:
        seed: of the job or of the teacher pool.
        stream: what is drawn, such as `distill/real`; streams are independent of each other.
        step: which draw of that stream.
        device: where it draws; the CPU by default.
    """
    word = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()[:8]
    made = torch.Generator(device or "cpu")
    made.manual_seed(int.from_bytes(word, "little") >> 1)
    return made


def moved(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on a device; a GPU takes it when it gets there, and is not waited for."""
    if device.type != "cuda" or drawn.device.type != "cpu":
        return drawn.to(device)
    # Out of page-locked memory alone is a copy queued like a kernel; PyTorch keeps that memory until it is done.
    return drawn.pin_memory().to(device, non_blocking=True)


def moved_together(drawn: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Several small tensors on a device; a GPU takes them in one copy.

    Args:
        drawn: of any shapes and types, on the CPU.
        device: where to.
    """
    if device.type != "cuda" or not drawn:
        return [each.to(device) for each in drawn]
    # As bytes, the widest type first: so each begins where its type may.
    order = sorted(range(len(drawn)), key=lambda index: -drawn[index].element_size())
    flat = [drawn[index].contiguous().view(-1).view(torch.uint8) for index in order]
    parts = moved(torch.cat(flat), device).split([len(each) for each in flat])
    there = dict(zip(order, parts, strict=True))
    return [there[index].view(each.dtype).view(each.shape) for index, each in enumerate(drawn)]
