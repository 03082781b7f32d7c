from __future__ import annotations

import pytest
import torch

from ncfm_core import augment
from ncfm_core.augment import NUM_PARAMETERS, OPERATIONS
from ncfm_core.rng import generator
from ncfm_core.spec import AugmentSpec

ALL = AugmentSpec.model_validate_json(
    '{"policy": "stack", "ops": ["color", "crop", "cutout", "flip", "scale", "rotate"]}'
).ops


def images(num: int = 6, size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn((num, channels, size, size), generator=generator(0, "images"))


@pytest.mark.parametrize("policy", ["single", "stack"])
def test_siamese_augmenting_together_is_augmenting_apart(policy: str) -> None:
    batch = images()
    for step in range(20):
        augmentation = augment.draw(AugmentSpec(policy=policy, ops=ALL), generator(0, "draw", step))  # type: ignore[arg-type]
        together = augmentation(batch)
        apart = torch.cat([augmentation(batch[:2]), augmentation(batch[2:])])
        torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("name", OPERATIONS)
def test_per_image_parameters_equal_one_image_at_a_time(name: str) -> None:
    batch = images()
    parameters = torch.rand((len(batch), NUM_PARAMETERS[name]), generator=generator(0, "parameters"))
    together = OPERATIONS[name](batch, parameters)
    singly = torch.cat([OPERATIONS[name](batch[i : i + 1], parameters[i : i + 1]) for i in range(len(batch))])
    torch.testing.assert_close(together, singly)
    assert together.shape == batch.shape


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_reach_the_images(name: str) -> None:
    batch = images(2, size=6).to(torch.float64).requires_grad_(True)
    parameters = torch.tensor([[0.3, 0.6, 0.2][: NUM_PARAMETERS[name]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: OPERATIONS[name](x, parameters), (batch,))


def test_crop_shifts_by_up_to_an_eighth_and_fills_with_zero() -> None:
    batch = torch.ones(1, 1, 32, 32)
    farthest = augment.crop(batch, torch.tensor([[0.999, 0.0]]))
    assert farthest[0, 0, -4:].sum() == 0
    assert farthest[0, 0, :, :4].sum() == 0
    assert farthest.sum() == 28 * 28
    assert torch.equal(augment.crop(batch, torch.tensor([[0.5, 0.5]])), batch)


def test_cutout_is_a_square_of_half_the_size() -> None:
    batch = torch.ones(1, 1, 32, 32)
    assert (augment.cutout(batch, torch.tensor([[0.5, 0.5]])) == 0).sum() == 16 * 16
    assert (augment.cutout(batch, torch.tensor([[0.0, 0.0]])) == 0).sum() == 8 * 8


def test_color_formulas_hold() -> None:
    batch = images(1).to(torch.float64)
    u = torch.tensor([[0.7, 0.2, 0.9]], dtype=torch.float64)
    bright = batch + (0.7 - 0.5)
    grey = bright.mean(1, keepdim=True)
    saturated = (bright - grey) * (2 * 0.2) + grey
    mean = saturated.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augment.color(batch, u), (saturated - mean) * (0.9 + 0.5) + mean)


def test_stack_takes_one_geometric_operation_in_the_documented_order() -> None:
    seen = set()
    for step in range(50):
        names = [
            name for name, _ in augment.draw(AugmentSpec(policy="stack", ops=ALL), generator(0, "d", step)).operations
        ]
        assert names[:2] == ["flip", "color"] and names[3] == "cutout" and len(names) == 4
        seen.add(names[2])
    assert seen == {"crop", "scale", "rotate"}


def test_none_changes_nothing() -> None:
    batch = images()
    assert augment.draw(AugmentSpec(policy="none", ops=ALL), generator(0, "d"))(batch) is batch


def test_cutmix_share_is_the_area_that_stays() -> None:
    batch = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    for step in range(30):
        mix = augment.draw_cutmix(1.0, 2, (16, 16), generator(0, "cutmix", step))
        assert mix is not None
        if mix.order.tolist() == [1, 0]:
            assert mix(batch)[0].mean().item() == pytest.approx(1 - mix.share)
    assert augment.draw_cutmix(0.0, 2, (16, 16), generator(0, "cutmix")) is None


@pytest.mark.parametrize("policy", ["none", "single", "stack"])
def test_batches_augmented_at_once_equal_each_apart(policy: str) -> None:
    batches = torch.stack([images(), images() * 2, images() - 1])
    for step in range(12):
        drawn = [
            augment.draw(AugmentSpec(policy=policy, ops=ALL), generator(0, f"draw/{i}", step), 6)  # type: ignore[arg-type]
            for i in range(3)
        ]
        apart = torch.stack([augmentation(batch) for augmentation, batch in zip(drawn, batches, strict=True)])
        torch.testing.assert_close(augment.each(drawn, batches), apart)
