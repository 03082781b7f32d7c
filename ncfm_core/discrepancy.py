"""The characteristic-function gap of NCFM (arXiv 2502.20653, equations 4 to 6).

Shapes: C classes, N images of a class, D features, K frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-12
"""Inside every square root: its gradient at zero would be NaN."""


@dataclass(frozen=True, slots=True)
class CharacteristicFunction:
    """mean_n exp(i <t, f_n>) of each class at K frequencies: real and imaginary part, float32 of shape (C, K)."""

    real: Tensor
    imaginary: Tensor

    def detach(self) -> CharacteristicFunction:
        return CharacteristicFunction(self.real.detach(), self.imaginary.detach())


def characteristic_function(features_CND: Tensor, frequencies_KD: Tensor) -> CharacteristicFunction:
    """The empirical characteristic function of each class.

    Args:
        features_CND: shape (C, N, D).
        frequencies_KD: shape (K, D), shared by the classes: <t, f> is one product.
    """
    phases_CNK = features_CND.to(torch.float32) @ frequencies_KD.T
    return CharacteristicFunction(phases_CNK.cos().mean(1), phases_CNK.sin().mean(1))


def gap(real: CharacteristicFunction, synthetic: CharacteristicFunction, amplitude_weight: float) -> Tensor:
    """The discrepancy of each class (NCFD), mean over frequencies of the square root of

        a (|R| - |S|)^2 + (1 - a) 2 (|R||S| - Re R Re S - Im R Im S)

    where the first part compares amplitudes and the second phases. At a = 1/2 the two recombine to |R - S|^2 / 2, which is used
    there: half the work, and no amplitude that has no gradient.

    Args:
        real: of shape (C, K).
        synthetic: likewise.
        amplitude_weight: a, in [0, 1]; the phase has 1 - a.

    Returns:
        Shape (C,), not negative, at most about sqrt(2).
    """
    if amplitude_weight == 0.5:
        squared = 0.5 * ((real.real - synthetic.real).square() + (real.imaginary - synthetic.imaginary).square())
        return (squared + EPSILON).sqrt().mean(1)
    real_amplitude, synthetic_amplitude = (
        (each.real.square() + each.imaginary.square() + EPSILON).sqrt() for each in (real, synthetic)
    )
    amplitude = (real_amplitude - synthetic_amplitude).square()
    inner = real.real * synthetic.real + real.imaginary * synthetic.imaginary
    phase = 2 * (real_amplitude * synthetic_amplitude - inner)
    squared = amplitude_weight * amplitude + (1 - amplitude_weight) * phase
    return (squared.clamp_min(0) + EPSILON).sqrt().mean(1)
