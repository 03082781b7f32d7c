"""DD-Ranking's label-robust score: how much of a result is the images' own doing. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelRobustScore:
    """The score and what it is made of (DD-Ranking, arXiv 2505.13300); accuracies are fractions in [0, 1]."""

    score: float
    """LRS, in [0, 1]; 0.27 where images are neither better than random ones nor worse than the full data."""
    hard_label_recovery: float
    """HLR: full data minus the set under hard labels; lower is better."""
    improvement_over_random: float
    """IOR: the set minus random real images, both under the set's own protocol; higher is better."""
    weight: float
    """w: of the improvement over random; the recovery has 1 - w."""


def label_robust_score(*, full: float, hard: float, own: float, random: float, weight: float = 0.5) -> LabelRobustScore:
    """Combine four accuracies: alpha = w IOR - (1 - w) HLR, LRS = (e^alpha - e^-1) / (e - e^-1).

    The board's code puts percent into these formulas; alpha then leaves [-1, 1], which the formula is made for. Here they are
    fractions.

    Args:
        full: of networks trained on the full data.
        hard: of students trained on the set with hard labels.
        own: of students trained on the set under its own protocol (the same as `hard` where that has hard labels).
        random: of students trained on as many random real images under the set's own protocol.
        weight: w, in [0, 1].
    """
    recovery, improvement = full - hard, own - random
    alpha = weight * improvement - (1 - weight) * recovery
    score = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    return LabelRobustScore(score, recovery, improvement, weight)
