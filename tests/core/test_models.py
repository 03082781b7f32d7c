from __future__ import annotations

import pytest
import torch

from ncfm_core.models import build_model
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
@pytest.mark.parametrize(
    ("size", "channels", "depth", "features"), [(8, 1, 2, 4), (28, 1, 3, 16), (32, 3, 3, 16), (64, 3, 4, 16)]
)
def test_features_are_the_last_map_and_images_are_independent(
    norm: str, size: int, channels: int, depth: int, features: int
) -> None:
    spec = ModelSpec(name="convnet", depth=depth, width=8, norm=norm)  # type: ignore[arg-type]
    model = build_model(spec, image_shape=(channels, size, size), num_classes=5, draw=generator(0, "init"))
    images = torch.randn((3, channels, size, size), generator=generator(0, "images"))
    assert model.features(images).shape == (3, 8 * features)
    assert model.features(images).min() >= 0
    torch.testing.assert_close(model(images)[1:], model(images[1:]))


def test_initial_weights_depend_on_the_generator_alone_and_have_pytorchs_range() -> None:
    spec = ModelSpec(name="convnet", depth=3, width=16, norm="instance")
    build = [build_model(spec, image_shape=(3, 32, 32), num_classes=10, draw=generator(s, "init")) for s in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in build)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    bound = (16 * 9) ** -0.5
    weight = build[0].get_parameter("convs.1.weight")
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
