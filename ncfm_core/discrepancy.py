"""How far apart two sets of features are: the characteristic-function gap of NCFM (arXiv 2502.20653, equations 4 to 6) and the
mean gap of DM (arXiv 2110.04181, equation 5).

Shapes: C classes, B classes of a block, N images of a class, D features, K frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPSILON = 1e-12
"""Inside every square root: its gradient at zero would be NaN."""
VARIANCE_FLOOR = 1e-6
"""Added to a variance that is divided by: at tiny frequencies both sides are exactly 1."""


@dataclass(frozen=True, slots=True)
class CharacteristicFunction:
    """mean_n exp(i <t, f_n>) of each class at K frequencies: real and imaginary part, float32 of shape (C, K)."""

    real: Tensor
    imaginary: Tensor

    def __getitem__(self, classes: slice) -> CharacteristicFunction:
        return CharacteristicFunction(self.real[classes], self.imaginary[classes])


def characteristic_function(features_CND: Tensor, frequencies_KD: Tensor) -> CharacteristicFunction:
    """The empirical characteristic function of each class.

    Args:
        features_CND: shape (C, N, D).
        frequencies_KD: shape (K, D), shared by the classes: <t, f> is one product.
    """
    phases_CNK = features_CND.to(frequencies_KD.dtype) @ frequencies_KD.T
    return CharacteristicFunction(phases_CNK.cos().mean(1), phases_CNK.sin().mean(1))


@torch.no_grad()
def characteristic_function_by_class(features_CND: Tensor, frequencies_KD: Tensor) -> CharacteristicFunction:
    """The same without gradient, a class at a time: the phases of a thousand images a class fit no cache together."""
    each = [characteristic_function(features_CND[c : c + 1], frequencies_KD) for c in range(len(features_CND))]
    return CharacteristicFunction(torch.cat([one.real for one in each]), torch.cat([one.imaginary for one in each]))


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
    return squared_gap(real, synthetic, amplitude_weight).add(EPSILON).sqrt().mean(1)


def power(
    real: CharacteristicFunction,
    synthetic: CharacteristicFunction,
    amplitude_weight: float,
    *,
    num_real: int,
    num_synthetic: int,
) -> Tensor:
    """The gap over its sampling error: what a frequency says about the difference, not how large it looks.

    At each frequency the squared gap is divided by the variance (1 - |R|^2) / n + (1 - |S|^2) / m that both empirical
    characteristic functions have from sampling alone; the power of a two-sample test grows with it (arXiv 1605.06796,
    arXiv 1611.04488).

    Args:
        real: of shape (C, K).
        synthetic: likewise.
        amplitude_weight: as in `gap`.
        num_real: n, images behind each value of `real`.
        num_synthetic: m, likewise of `synthetic`.

    Returns:
        Shape (C,), mean over frequencies of the root of the ratio.
    """
    variance = sum(
        (1 - each.real.square() - each.imaginary.square()).clamp_min(0) / number
        for each, number in ((real, num_real), (synthetic, num_synthetic))
    )
    ratio = squared_gap(real, synthetic, amplitude_weight) / (variance + VARIANCE_FLOOR)
    return ratio.add(EPSILON).sqrt().mean(1)


def squared_gap(real: CharacteristicFunction, synthetic: CharacteristicFunction, amplitude_weight: float) -> Tensor:
    """What stands below the root in `gap`, at each frequency: shape (C, K), not negative."""
    if amplitude_weight == 0.5:
        return 0.5 * ((real.real - synthetic.real).square() + (real.imaginary - synthetic.imaginary).square())
    real_amplitude, synthetic_amplitude = (
        (each.real.square() + each.imaginary.square() + EPSILON).sqrt() for each in (real, synthetic)
    )
    amplitude = (real_amplitude - synthetic_amplitude).square()
    inner = real.real * synthetic.real + real.imaginary * synthetic.imaginary
    phase = 2 * (real_amplitude * synthetic_amplitude - inner)
    return (amplitude_weight * amplitude + (1 - amplitude_weight) * phase).clamp_min(0)


def mean_gap(real_mean_CD: Tensor, synthetic_CND: Tensor) -> Tensor:
    """Squared distance of the class means (DM's term).

    Args:
        real_mean_CD: mean features of the real images, shape (C, D).
        synthetic_CND: shape (C, N, D).

    Returns:
        Shape (C,), not negative.
    """
    return (real_mean_CD - synthetic_CND.mean(1)).square().sum(1)


class Target(Protocol):
    """The real side of a discrepancy, computed once for all image updates of a draw."""

    def gaps(self, synthetic_BND: Tensor, classes: slice) -> Tensor:
        """The discrepancy of each class of a block, shape (B,), differentiable in the synthetic features."""
        ...


@dataclass(frozen=True, slots=True)
class CharacteristicTarget:
    """The characteristic functions of the real features, at the frequencies of a draw (NCFM)."""

    real: CharacteristicFunction
    """Of shape (C, K)."""
    frequencies_KD: Tensor
    """Shape (K, D), shared by the classes."""
    amplitude_weight: float
    """As in `gap`."""

    def gaps(self, synthetic_BND: Tensor, classes: slice) -> Tensor:
        """`gap` of each class of a block, shape (B,)."""
        synthetic = characteristic_function(synthetic_BND, self.frequencies_KD)
        return gap(self.real[classes], synthetic, self.amplitude_weight)


@dataclass(frozen=True, slots=True)
class MeanTarget:
    """The means of the real features (DM)."""

    real_mean_CD: Tensor
    """Shape (C, D)."""

    def gaps(self, synthetic_BND: Tensor, classes: slice) -> Tensor:
        """`mean_gap` of each class of a block, shape (B,)."""
        return mean_gap(self.real_mean_CD[classes], synthetic_BND)
