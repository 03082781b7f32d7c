"""The step size of the images along the steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

PATIENCE, FACTOR, THRESHOLD = 500, 0.5, 1e-4
"""Of `plateau`: steps without a loss that is lower by this share, and what the rate is then multiplied by (the settings of the
authors' code, arXiv 2502.20653)."""
PLATEAU_EVERY = 25
"""Steps between two looks at the losses, which stay on the device in between."""


class Schedule:
    """`constant`, `cosine` (ends at zero) or `plateau` (halved whenever the loss has not fallen for 500 steps).

    The rule of `plateau` is applied to every step's loss in order, but only each 25 steps, so that the device is not waited
    for: a cut comes up to 24 steps late.
    """

    def __init__(self, name: Literal["constant", "cosine", "plateau"], lr: float, total: int, device: torch.device):
        """
        Args:
            name: which rule.
            lr: initial step size.
            total: steps in all.
            device: where losses are.
        """
        self._name, self._lr, self._total = name, lr, total
        self._losses = torch.zeros(PLATEAU_EVERY, device=device)
        self._best, self._waited, self._cuts = math.inf, 0, 0

    def rate(self, step: int) -> float:
        """The step size of a step, counted from 0."""
        if self._name == "cosine":
            return self._lr * 0.5 * (1 + math.cos(math.pi * step / self._total))
        return self._lr * FACTOR**self._cuts

    def note(self, step: int, loss: Tensor) -> None:
        """Take the loss of a step, a scalar on the device."""
        if self._name != "plateau":
            return
        self._losses[step % PLATEAU_EVERY] = loss
        if (step + 1) % PLATEAU_EVERY:
            return
        for value in self._losses.tolist():
            if value < self._best * (1 - THRESHOLD):
                self._best, self._waited = value, 0
            else:
                self._waited += 1
            if self._waited > PATIENCE:
                self._cuts, self._waited = self._cuts + 1, 0

    def state(self) -> dict[str, Tensor]:
        """What `plateau` has seen, as flat tensors: `losses` of shape (25,), `counts` of shape (3,). Empty for other rules."""
        if self._name != "plateau":
            return {}
        counts = torch.tensor([self._best, self._waited, self._cuts], dtype=torch.float64)
        return {"losses": self._losses.clone(), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; KeyError where it is of another rule."""
        if self._name != "plateau":
            return
        self._losses.copy_(state["losses"])
        best, waited, cuts = state["counts"].tolist()
        self._best, self._waited, self._cuts = best, int(waited), int(cuts)
