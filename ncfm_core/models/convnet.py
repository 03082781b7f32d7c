"""The ConvNet of the distillation literature (Dynamic few-shot visual learning, arXiv 1804.09458; as used by DC, DM and NCFM)."""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core.spec import ModelSpec


class ConvNet(nn.Module):
    """Blocks of [conv 3x3, norm, ReLU, average pool 2x2], then one linear layer.

    Every image is treated on its own (no batch statistics), so images of all classes can go through one forward exactly.
    Images of 28x28 are padded to 32x32 by the first convolution.
    """

    def __init__(self, spec: ModelSpec, *, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.width = spec.width
        first_padding = 3 if image_size == 28 else 1
        sizes = [channels] + [spec.width] * spec.depth
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=first_padding if i == 0 else 1) for i in range(spec.depth)
        )
        groups = {"instance": spec.width, "group": gcd(spec.width, 4), "none": 0}[spec.norm]
        self.norms = nn.ModuleList(
            nn.GroupNorm(groups, spec.width) if groups else nn.Identity() for _ in range(spec.depth)
        )
        last_size = (image_size + 2 * (first_padding - 1)) >> spec.depth
        self.num_features = spec.width * last_size**2
        self.classifier = nn.Linear(self.num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Flat embedding.

        Args:
            images: normalised, shape (N, channels, H, W).

        Returns:
            Shape (N, num_features), after the last ReLU and pool, hence non-negative.
        """
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = F.avg_pool2d(F.relu(norm(conv(images))), 2)
        return images.flatten(1)

    def forward(self, images: Tensor, *, features_only: bool = False) -> Tensor:
        """Logits of shape (N, classes), or the features (so that `torch.func.functional_call` reaches both)."""
        features = self.features(images)
        if features_only:
            return features
        logits: Tensor = self.classifier(features)
        return logits


def build_model(
    spec: ModelSpec, *, image_shape: tuple[int, int, int], num_classes: int, draw: torch.Generator
) -> ConvNet:
    """A freshly initialised network, on the CPU.

    Weights and biases are uniform in +-1/sqrt(fan_in), which is what PyTorch's default initialisation comes to, drawn from
    `draw` alone: the global generator is neither read nor moved.
    """
    channels, image_size, _ = image_shape
    with torch.device("meta"):
        model = ConvNet(spec, channels=channels, image_size=image_size, num_classes=num_classes)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                for parameter in (module.weight, module.bias):
                    assert parameter is not None
                    parameter.copy_(torch.rand(parameter.shape, generator=draw).mul_(2 * bound).sub_(bound))
            elif isinstance(module, nn.GroupNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
    return model
