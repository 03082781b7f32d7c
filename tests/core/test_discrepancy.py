from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from ncfm_core.discrepancy import (
    EPSILON,
    CharacteristicFunction,
    CharacteristicTarget,
    MeanTarget,
    Target,
    characteristic_function,
    characteristic_function_by_class,
    gap,
    mean_gap,
    power,
)
from ncfm_core.rng import generator


def features(name: str, num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((3, num, 5), generator=generator(0, name), dtype=dtype)


FREQUENCIES = torch.randn((7, 5), generator=generator(0, "t"), dtype=torch.float64)


def slow_gap(real: Tensor, synthetic: Tensor, frequencies: Tensor, alpha: float) -> list[float]:
    """The formula of the paper in complex numbers, one class and frequency at a time."""
    result = []
    for r, s in zip(real.tolist(), synthetic.tolist(), strict=True):
        roots = []
        for t in frequencies.tolist():
            chf_r, chf_s = (
                sum(cmath.exp(1j * sum(a * b for a, b in zip(t, f, strict=True))) for f in side) / len(side)
                for side in (r, s)
            )
            amplitude = (abs(chf_r) - abs(chf_s)) ** 2
            phase = 2 * abs(chf_r) * abs(chf_s) * (1 - math.cos(cmath.phase(chf_r) - cmath.phase(chf_s)))
            roots.append(math.sqrt(alpha * amplitude + (1 - alpha) * phase))
        result.append(sum(roots) / len(roots))
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gap_is_the_papers_formula(alpha: float) -> None:
    real, synthetic = features("real", 9), features("synthetic", 4)
    fast = gap(
        characteristic_function(real, FREQUENCIES.float()),
        characteristic_function(synthetic, FREQUENCIES.float()),
        alpha,
    )
    assert fast.tolist() == pytest.approx(slow_gap(real, synthetic, FREQUENCIES, alpha), abs=2e-6)


def test_closed_form_at_one_half_is_the_split_form() -> None:
    sides = [characteristic_function(features(name, 6), FREQUENCIES.float()) for name in ("real", "synthetic")]
    torch.testing.assert_close(gap(sides[0], sides[1], 0.5), gap(sides[0], sides[1], 0.5 + 1e-7), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_gap_gradient_is_right(alpha: float) -> None:
    def of_parts(re: Tensor, im: Tensor) -> Tensor:
        return gap(real, CharacteristicFunction(re, im), alpha)

    real = CharacteristicFunction(*(torch.rand((2, 4), generator=generator(0, n), dtype=torch.float64) for n in "ab"))
    parts = tuple(torch.rand((2, 4), generator=generator(1, n), dtype=torch.float64).requires_grad_(True) for n in "ab")
    assert torch.autograd.gradcheck(of_parts, parts)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gap_of_equal_sides_is_zero_with_a_finite_gradient(alpha: float) -> None:
    same = features("real", 6).float().requires_grad_(True)
    function = characteristic_function(same, FREQUENCIES.float())
    value = gap(CharacteristicFunction(function.real.detach(), function.imaginary.detach()), function, alpha)
    assert value.max() <= 2 * math.sqrt(EPSILON) + 1e-3
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert gradient.isfinite().all()


def targets(real: Tensor) -> dict[str, Target]:
    function = characteristic_function(real, FREQUENCIES)
    return {
        "gap": CharacteristicTarget(function, FREQUENCIES, 0.5),
        "split gap": CharacteristicTarget(function, FREQUENCIES, 0.3),
        "mean": MeanTarget(real.mean(1)),
    }


@pytest.mark.parametrize("term", ["gap", "split gap", "mean"])
def test_gradient_of_every_term_with_respect_to_features_is_right(term: str) -> None:
    target = targets(features("real", 9))[term]
    synthetic = features("synthetic", 4).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: target.gaps(x, slice(0, 3)), (synthetic,))


@pytest.mark.parametrize(("term", "step"), [("gap", 1e-8), ("split gap", 1e-6), ("mean", 1e-8)])
def test_gradient_at_zero_gap_is_right(term: str, step: float) -> None:
    """The root is as good as flat within sqrt(EPSILON) of zero: steps of the numerical derivative stay near that.

    In the split form amplitudes cancel, which leaves an error of about 1e-10 to be divided by the step.
    """
    same = features("real", 6)
    target = targets(same)[term]
    assert torch.autograd.gradcheck(
        lambda x: target.gaps(x, slice(0, 3)),
        (same.clone().requires_grad_(True),),
        eps=step,
        atol=1e-3 if term == "split gap" else 1e-4,
    )


def test_gradient_of_the_power_is_right() -> None:
    def of_frequencies(frequencies: Tensor) -> Tensor:
        sides = [characteristic_function(each, frequencies) for each in (real, synthetic)]
        return power(sides[0], sides[1], 0.5, num_real=9, num_synthetic=4)

    real, synthetic = features("real", 9), features("synthetic", 4)
    assert torch.autograd.gradcheck(of_frequencies, (FREQUENCIES.clone().requires_grad_(True),))


def test_power_is_the_gap_over_its_sampling_error() -> None:
    real, synthetic = features("real", 9), features("synthetic", 4)
    slow = []
    for r, s in zip(real.tolist(), synthetic.tolist(), strict=True):
        ratios = []
        for t in FREQUENCIES.tolist():
            chf_r, chf_s = (
                sum(cmath.exp(1j * sum(a * b for a, b in zip(t, f, strict=True))) for f in side) / len(side)
                for side in (r, s)
            )
            variance = (1 - abs(chf_r) ** 2) / 9 + (1 - abs(chf_s) ** 2) / 4
            ratios.append(math.sqrt(0.5 * abs(chf_r - chf_s) ** 2 / (variance + 1e-6)))
        slow.append(sum(ratios) / len(ratios))
    sides = [characteristic_function(each, FREQUENCIES) for each in (real, synthetic)]
    assert power(sides[0], sides[1], 0.5, num_real=9, num_synthetic=4).tolist() == pytest.approx(slow, rel=1e-6)


def test_mean_gap_is_the_squared_distance_of_the_means() -> None:
    real, synthetic = features("real", 9), features("synthetic", 4)
    slow = [
        sum(
            (sum(column) / 9 - sum(other) / 4) ** 2
            for column, other in zip(zip(*r, strict=True), zip(*s, strict=True), strict=True)
        )
        for r, s in zip(real.tolist(), synthetic.tolist(), strict=True)
    ]
    assert mean_gap(real.mean(1), synthetic).tolist() == pytest.approx(slow, rel=1e-9)


def test_class_by_class_is_the_same_function() -> None:
    together = characteristic_function(features("real", 9), FREQUENCIES)
    apart = characteristic_function_by_class(features("real", 9), FREQUENCIES)
    torch.testing.assert_close(apart.real, together.real)
    torch.testing.assert_close(apart.imaginary, together.imaginary)


def test_amplitude_has_no_gradient_at_one_image_a_class() -> None:
    """One image has amplitude 1 at every frequency: at amplitude weight 1 nothing is left to learn."""
    one = features("synthetic", 1).requires_grad_(True)
    target = CharacteristicTarget(characteristic_function(features("real", 9), FREQUENCIES), FREQUENCIES, 1.0)
    (gradient,) = torch.autograd.grad(target.gaps(one, slice(0, 3)).sum(), one)
    assert gradient.abs().max() < 1e-6
