"""What the images and psi go down and up: derivatives of every term through a network, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ncfm_core import augment
from ncfm_core.augment import Augmentation
from ncfm_core.datasets import Dataset
from ncfm_core.discrepancy import CharacteristicTarget, MeanTarget, Target, characteristic_function
from ncfm_core.distill import Distillation, _Draw
from ncfm_core.frequencies import ScaleMixture
from ncfm_core.networks import Norm
from ncfm_core.pools import Extractors, TeacherPool, TeacherTraining
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec

CPU = torch.device("cpu")
CLASSES = slice(0, 2)
"""Those whose images are moved: two of ten."""
FLAT_STEP = 1e-6
"""Of finite differences at a gap of zero, where the root is flat within 1e-6 (the root of EPSILON), and the split form, whose
amplitudes cancel, is exact to about 1e-10."""

Value = Callable[[Tensor], Tensor]


def in_float64(self: Dataset, images: Tensor) -> Tensor:
    """`Dataset.normalise`, which computes in float32."""
    mean, std = (each.double().view(1, -1, 1, 1) for each in (self.mean, self.std))
    return (images / 255 if images.dtype == torch.uint8 else images).sub(mean).div(std)


@pytest.fixture(params=["instance", "group"])
def run(
    request: pytest.FixtureRequest, digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> Distillation:
    """Two images a class of 4x4 tiles, under a network of width 4 in float64; its target is yet to be set."""
    norm: Norm = request.param
    model = spec.model.model_copy(update={"depth": 1, "width": 4, "norm": norm})
    teacher = TeacherTraining(digits, model, spec.teachers.training, seed=0, index=0, device=CPU)
    pool = TeacherPool(model, digits, [teacher.result()], CPU)
    method = spec.method.model_copy(update={"factor": 2})
    run = Distillation(digits, pool, method, ipc=1, seed=0, device=CPU)
    monkeypatch.setattr(Dataset, "normalise", in_float64)
    extractors = pool.draw(generator(0, "network"))
    double = Extractors(
        *({name: value.double() for name, value in each.items()} for each in (extractors.match, extractors.calibrate))
    )
    run._draw = _Draw(double, augmentation_of(run, "augment"), MeanTarget(torch.zeros(10, 1)))
    return run


def augmentation_of(run: Distillation, name: str) -> Augmentation:
    drawn = augment.draw(run._method.augment, generator(0, name))
    return Augmentation(tuple((operation, parameters.double()) for operation, parameters in drawn.operations))


def images_of(run: Distillation) -> Tensor:
    return run.synthetic.images.detach()[CLASSES].double().requires_grad_(True)


def features_of(run: Distillation, images: Tensor) -> Tensor:
    """Shape (C, N, D), as `_matched` has them."""
    assert run._draw is not None
    with torch.no_grad():
        features = run._features_forward(run._draw.extractors.match, run._decoded(images, run._draw.augmentation))
    return features.view(len(images), -1, features.shape[1])


def target_of(term: str, real_CND: Tensor) -> Target:
    if term == "mean":
        return MeanTarget(real_CND.mean(1))
    frequencies = 3 * torch.randn((7, real_CND.shape[2]), generator=generator(0, "t"), dtype=torch.float64)
    weight = {"gap": 0.5, "split gap": 0.3}[term]
    return CharacteristicTarget(characteristic_function(real_CND, frequencies), frequencies, weight)


def matching(run: Distillation, term: str, real_CND: Tensor) -> Value:
    """The term as a step computes it, of the images of `CLASSES`."""
    assert run._draw is not None
    run._draw = _Draw(run._draw.extractors, run._draw.augmentation, target_of(term, real_CND))
    return lambda images: run._matched(images, CLASSES)


def test_calibration_through_a_network_has_the_right_gradient(run: Distillation) -> None:
    augmentation = augmentation_of(run, "calibrate")
    assert gradcheck(lambda images: run._calibrated(images, CLASSES, augmentation), (images_of(run),))


@pytest.mark.parametrize("term", ["gap", "split gap", "mean"])
def test_matching_through_a_network_has_the_right_gradient(run: Distillation, digits: Dataset, term: str) -> None:
    real = digits.train_images[digits.members[CLASSES, :1].flatten()].double() / 255
    value = matching(run, term, features_of(run, real))
    assert value(images_of(run)).item() > 1e-3
    assert gradcheck(value, (images_of(run),))


@pytest.mark.parametrize("term", ["gap", "split gap", "mean"])
def test_matching_through_a_network_at_zero_gap_has_the_right_gradient(run: Distillation, term: str) -> None:
    """It is none: the root with EPSILON inside is smooth, and every direction leads up."""
    images = images_of(run)
    value = matching(run, term, features_of(run, images))
    (gradient,) = torch.autograd.grad(value(images), images)
    assert gradient.abs().max() < 1e-6
    assert gradcheck(value, (images,), eps=FLAT_STEP, atol=1e-3)
    with torch.no_grad():
        aside = torch.randn(images.shape, generator=generator(0, "aside"), dtype=torch.float64)
        assert all(value(images + step * aside) > value(images) for step in (1e-3, -1e-3))


# psi


def features(name: str, num: int) -> Tensor:
    return torch.randn((3, num, 5), generator=generator(0, name), dtype=torch.float64)


NORMAL = torch.randn((8, 5), generator=generator(0, "z"), dtype=torch.float64)
LOGS = 0.3 * torch.randn((4, 5), generator=generator(0, "logs"), dtype=torch.float64)
HALF = features("real", 4)
SAMPLES = {
    "apart": (features("real", 8), features("synthetic", 4)),
    "zero gap": (features("real", 8), features("real", 8)),
    "zero gap and no noise": (torch.cat([HALF, HALF], dim=1), torch.cat([HALF, HALF], dim=1)),
}


def psi(objective: str, amplitude_weight: float) -> ScaleMixture:
    return ScaleMixture(
        num_components=4,
        num_features=5,
        frequency_scale=1.5,
        lr=1e-3,
        ascent_steps=1,
        objective=objective,  # type: ignore[arg-type]
        amplitude_weight=amplitude_weight,
        device=CPU,
    )


def objective_of(sampler: ScaleMixture, real: Tensor, synthetic: Tensor) -> Value:
    """The class mean of what psi raises, of its log-scales."""

    def value(log_scales: Tensor) -> Tensor:
        sampler.log_scales = log_scales
        return sampler._value(real, synthetic, sampler.frequencies(NORMAL)).mean()

    return value


@pytest.mark.parametrize("sides", SAMPLES)
@pytest.mark.parametrize("amplitude_weight", [0.5, 0.3])
@pytest.mark.parametrize("objective", ["gap", "power", "debiased"])
def test_every_objective_of_psi_has_the_right_gradient(objective: str, amplitude_weight: float, sides: str) -> None:
    real, synthetic = SAMPLES[sides]
    value = objective_of(psi(objective, amplitude_weight), real, synthetic)
    logs = LOGS.clone().requires_grad_(True)
    is_flat = sides == "zero gap and no noise" or (sides == "zero gap" and objective != "debiased")
    # Where both sides are the same images, no frequency tells them apart, and psi has nowhere to go.
    (gradient,) = torch.autograd.grad(value(logs), logs)
    assert bool(gradient.abs().max() < 1e-6) is is_flat
    assert gradcheck(value, (logs,), eps=FLAT_STEP, atol=1e-3 if is_flat else 1e-5)


@pytest.mark.parametrize("objective", ["gap", "power", "debiased"])
def test_ascent_steps_along_the_gradient_of_its_objective(objective: str) -> None:
    """Which it gathers class by class, through the frequencies."""
    real, synthetic = SAMPLES["apart"]
    sampler = psi(objective, 0.5)
    sampler.ascend(NORMAL.float(), real.float(), synthetic.float())
    first_moment = sampler.state()["optimizer.0.exp_avg"]
    logs = torch.zeros((4, 5), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective_of(psi(objective, 0.5), real, synthetic)(logs), logs)
    torch.testing.assert_close(first_moment / -0.1, gradient.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("amplitude_weight", [0.5, 0.3])
@pytest.mark.parametrize("objective", ["power", "debiased"])
@pytest.mark.parametrize("sides", ["apart", "zero gap"])
def test_every_objective_has_the_right_gradient_by_features(
    objective: str, amplitude_weight: float, sides: str
) -> None:
    real, synthetic = SAMPLES[sides]
    sampler = psi(objective, amplitude_weight)
    frequencies = sampler.frequencies(NORMAL).detach().double()
    moved = synthetic.clone().requires_grad_(True)

    def value(synthetic_CND: Tensor) -> Tensor:
        return sampler._value(real, synthetic_CND, frequencies)

    assert gradcheck(value, (moved,), eps=FLAT_STEP, atol=1e-3 if sides == "zero gap" else 1e-5)
