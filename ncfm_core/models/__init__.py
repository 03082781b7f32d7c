"""Networks: forward gives logits, features the flat embedding before the classifier, maps what that is made of."""

from __future__ import annotations

import torch

from ncfm_core.errors import SpecError
from ncfm_core.geometry import CHANNELS, size_problem
from ncfm_core.models.alexnet import AlexNet
from ncfm_core.models.convnet import ConvNet
from ncfm_core.models.network import Network, initialise
from ncfm_core.models.resnet import ResNet18
from ncfm_core.models.vgg import VGG11
from ncfm_core.networks import NetworkName
from ncfm_core.spec import ModelSpec

__all__ = ["MODELS", "Network", "build_model"]

MODELS: dict[NetworkName, type[AlexNet | ConvNet | ResNet18 | VGG11]] = {
    "convnet": ConvNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "resnet18_ap": ResNet18,
}


def build_model(
    spec: ModelSpec, *, image_shape: tuple[int, int, int], num_classes: int, draw: torch.Generator
) -> Network:
    """A freshly initialised network, on the CPU, in training mode.

    Args:
        spec: which network.
        image_shape: (channels, H, W) of the images, H = W.
        num_classes: logits.
        draw: all initial weights come from it, see `initialise`.

    Raises:
        SpecError: images are too small for the network, not square, or of neither 1 nor 3 channels.
    """
    channels, image_size, width = image_shape
    if width != image_size:
        raise SpecError.of("image_shape", image_shape, "images are not square", "Scale and cut them to one size.")
    if channels not in CHANNELS:
        raise SpecError.of(
            "image_shape", image_shape, f"images have {channels} channels", "Give grey (1) or colour (3)."
        )
    if (too_small := size_problem("model", spec, image_size)) is not None:
        raise SpecError(too_small)
    with torch.device("meta"):
        model = MODELS[spec.name](spec, channels=channels, image_size=image_size, num_classes=num_classes)
    model.to_empty(device="cpu")
    initialise(model, draw)
    return model
