"""The minmax: psi must really climb, at fixed root mean square of its scales, on what is signal and not sampling noise."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.discrepancy import characteristic_function, gap
from ncfm_core.frequencies import Gaussian, ScaleMixture
from ncfm_core.pools import TeacherPool
from ncfm_core.rng import generator

COMPONENTS, FREQUENCIES = 8, 256


Objective = Literal["gap", "power", "debiased"]


def psi(num_features: int, *, lr: float = 0.05, steps: int = 1, objective: Objective = "gap") -> ScaleMixture:
    return ScaleMixture(
        num_components=COMPONENTS,
        num_features=num_features,
        frequency_scale=1.0,
        lr=lr,
        ascent_steps=steps,
        objective=objective,
        amplitude_weight=0.5,
        device=torch.device("cpu"),
    )


def mean_gap(sampler: ScaleMixture | Gaussian, normal: Tensor, left: Tensor, right: Tensor) -> float:
    with torch.no_grad():
        frequencies = sampler.frequencies(normal)
        sides = [characteristic_function(side, frequencies) for side in (left, right)]
        return gap(sides[0], sides[1], 0.5).mean().item()


@pytest.fixture(scope="module")
def batches(digits: Dataset, pool: TeacherPool) -> tuple[Tensor, list[Tensor]]:
    """Features of fixed synthetic images, and of disjoint real batches of every class, under one network."""
    weights = pool.draw(generator(0, "network")).match
    order = digits.class_batches(112, generator(0, "real"))

    def features(indices: Tensor) -> Tensor:
        with torch.no_grad():
            flat = pool.features(weights, digits.normalise(digits.train_images[indices.flatten()]))
        return flat.view(10, indices.shape[1], -1)

    synthetic = features(order[:, :1])
    return synthetic, [features(part) for part in order[:, 1:].split(37, dim=1)]


@pytest.mark.parametrize("objective", ["gap", "power", "debiased"])
def test_ascent_raises_the_gap_on_held_out_batches_above_what_real_against_real_gives(
    batches: tuple[Tensor, list[Tensor]], objective: Objective
) -> None:
    synthetic, (seen, held_out, other) = batches
    num_features = seen.shape[2]
    sampler = psi(num_features, objective=objective)
    fresh = torch.randn((FREQUENCIES, num_features), generator=generator(0, "held-out normals"))
    before, noise_before = (mean_gap(sampler, fresh, held_out, side) for side in (synthetic, other))
    for step in range(150):
        normal = torch.randn((FREQUENCIES, num_features), generator=generator(0, "normals", step))
        sampler.ascend(normal, seen, synthetic)
    after, noise_after = (mean_gap(sampler, fresh, held_out, side) for side in (synthetic, other))
    assert sampler.scales().square().mean(1).sqrt().tolist() == pytest.approx([1.0] * COMPONENTS, abs=1e-5)
    # The rise is signal only as far as two batches of real images do not show it too.
    assert after - before > 0.01
    assert after - before > 2 * (noise_after - noise_before)


def test_gradient_of_the_ascent_is_not_zero(batches: tuple[Tensor, list[Tensor]]) -> None:
    synthetic, (seen, *_) = batches
    sampler = psi(seen.shape[2], lr=0.01)
    normal = torch.randn((FREQUENCIES, seen.shape[2]), generator=generator(0, "normals"))
    gain = sampler.ascend(normal, seen, synthetic)
    assert gain > 0
    moved = sampler.log_scales.detach().abs()
    assert (moved > 0).float().mean() > 0.9
    assert sampler.log_scales.grad is None


@pytest.mark.parametrize("objective", ["gap", "power", "debiased"])
def test_gain_when_compared_with_a_slow_formula_is_the_first_order_of_the_objective(objective: Objective) -> None:
    """One class at a time in complex float64, its rise by finite differences along the step that was taken."""
    draw = generator(0, "features")
    real, synthetic = torch.randn((3, 8, 12), generator=draw), torch.randn((3, 4, 12), generator=draw) + 0.5
    normal = torch.randn((FREQUENCIES, 12), generator=generator(0, "normals"))
    sampler = psi(12, lr=1e-4, objective=objective)
    before = sampler.frequencies(normal).detach().double()
    gain = sampler.ascend(normal, real, synthetic).item()
    after = sampler.frequencies(normal).detach().double()

    def transform(features: Tensor, frequencies: Tensor) -> Tensor:
        return torch.exp(1j * (features.double() @ frequencies.T)).mean(0)

    def value(frequencies: Tensor) -> float:
        found = []
        for c in range(3):
            left, right = transform(real[c], frequencies), transform(synthetic[c], frequencies)
            distance = (left - right).abs() / 2**0.5
            if objective == "power":
                distance = distance / ((1 - left.abs() ** 2) / 8 + (1 - right.abs() ** 2) / 4 + 1e-6).sqrt()
            if objective == "debiased":
                halves = [transform(part, frequencies) for part in (real[c, :4], real[c, 4:])]
                distance = distance - (halves[0] - halves[1]).abs() / 2**0.5
            found.append(distance.mean())
        return torch.stack(found).mean().item()

    assert gain == pytest.approx(value(after) - value(before), rel=0.02)
    assert gain > 0


def test_frequencies_are_distinct_and_as_many_as_asked() -> None:
    sampler = psi(12)
    normal = torch.randn((FREQUENCIES, 12), generator=generator(0, "normals"))
    with torch.no_grad():
        frequencies = sampler.frequencies(normal)
    assert frequencies.shape == (FREQUENCIES, 12)
    assert len(frequencies.unique(dim=0)) == FREQUENCIES


def test_untrained_mixture_is_the_gaussian() -> None:
    normal = torch.randn((FREQUENCIES, 12), generator=generator(0, "normals"))
    with torch.no_grad():
        torch.testing.assert_close(psi(12).frequencies(normal), Gaussian(1.0).frequencies(normal))


def test_scales_stay_bounded_however_far_the_logs_run() -> None:
    sampler = psi(12)
    with torch.no_grad():
        sampler.log_scales.uniform_(-500, 500, generator=generator(0, "logs"))
    scales = sampler.scales()
    assert scales.isfinite().all()
    assert scales.max() <= 12**0.5 + 1e-4


def test_state_goes_on_with_the_same_bits(batches: tuple[Tensor, list[Tensor]]) -> None:
    synthetic, (seen, *_) = batches
    first, second = psi(seen.shape[2]), psi(seen.shape[2])
    normals = [torch.randn((FREQUENCIES, seen.shape[2]), generator=generator(0, "n", i)) for i in range(4)]
    for normal in normals[:2]:
        first.ascend(normal, seen, synthetic)
    second.load_state(first.state())
    for normal in normals[2:]:
        first.ascend(normal, seen, synthetic)
        second.ascend(normal, seen, synthetic)
    assert torch.equal(first.log_scales, second.log_scales)
