"""What all networks share: the three outputs, the norms, and the fresh start from a given generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core.geometry import num_features, pool_window
from ncfm_core.networks import Norm
from ncfm_core.spec import ModelSpec


class Network(nn.Module, ABC):
    """Images to a map, the map to flat features, the features to logits by one linear layer.

    A subclass builds its layers and then calls `_add_classifier`. Features are not negative: every network ends on ReLU and pool.
    """

    num_features: int
    """Width of the flat features."""
    classifier: nn.Linear

    def _add_classifier(self, spec: ModelSpec, image_size: int, num_classes: int) -> None:
        self.num_features = num_features(spec, image_size)
        self._window = pool_window(spec, image_size)
        self.classifier = nn.Linear(self.num_features, num_classes)

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor:
        """The last map.

        Args:
            images: normalised, shape (N, channels, H, W).

        Returns:
            Shape (N, C, H', W') as `geometry.last_map` has it, not negative.
        """

    def flat(self, maps: Tensor) -> Tensor:
        """The features, shape (N, num_features), that belong to maps of shape (N, C, H', W'); needs no weights."""
        return (maps if self._window == 1 else F.avg_pool2d(maps, self._window)).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """Flat features of shape (N, num_features), before the classifier; images are normalised, (N, channels, H, W)."""
        return self.flat(self.maps(images))

    def forward(self, images: Tensor, *, features_only: bool = False, maps_only: bool = False) -> Tensor:
        """Logits of shape (N, classes), or features, or maps (so that `torch.func.functional_call` reaches all three)."""
        maps = self.maps(images)
        if maps_only:
            return maps
        features = self.flat(maps)
        if features_only:
            return features
        logits: Tensor = self.classifier(features)
        return logits


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The norm after a convolution, with a weight and a bias for each channel.

    Instance norm is the group norm of one channel a group, as in the literature; of the sound ways to write it, PyTorch's native
    group norm was the fastest on a CPU, with and without gradients (docs/performance.md).
    """
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels if norm == "instance" else gcd(channels, 4), channels)


def initialise(model: nn.Module, draw: torch.Generator) -> None:
    """Fresh weights in place, on the CPU, from `draw` alone: the global generator is neither read nor moved.

    Weights and biases are uniform in +-1/sqrt(fan_in), which is what PyTorch's default initialisation comes to; norms start as
    the identity, running statistics at zero mean and unit variance.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(torch.rand(parameter.shape, generator=draw).mul_(2 * bound).sub_(bound))
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                module.reset_parameters()
