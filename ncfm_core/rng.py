"""Counted randomness: every draw has its own generator, made from (seed, stream, step), so that there is no state to save.

Draws are made on the CPU and moved, so that a seed means the same on every device.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """The generator of one draw.

    Args:
        seed: of the job or of the teacher pool.
        stream: what is drawn, such as `distill/real`; streams are independent of each other.
        step: which draw of that stream.
    """
    word = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()[:8]
    made = torch.Generator()
    made.manual_seed(int.from_bytes(word, "little") >> 1)
    return made
