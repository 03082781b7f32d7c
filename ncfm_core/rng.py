"""Counted randomness: every draw has its own generator, made from (seed, stream, step), so that there is no state to save.

Draws are made on the CPU and moved, so that a seed means the same on every device; but for the millions of normals behind
frequencies, which a GPU draws itself: for them the CPU would take longer than the GPU for the rest of the step.
"""

from __future__ import annotations

import hashlib

import torch


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
