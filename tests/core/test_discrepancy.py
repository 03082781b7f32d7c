from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from ncfm_core.discrepancy import EPSILON, CharacteristicFunction, characteristic_function, gap
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
