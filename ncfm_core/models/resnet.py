"""ResNet-18 (arXiv 1512.03385) with the stem for small images, and its variant with average pooling, as DC and DM use them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core.geometry import residual_stages
from ncfm_core.models.network import Network, norm_layer
from ncfm_core.spec import ModelSpec


class BasicBlock(nn.Module):
    """Two convolutions 3x3 beside a shortcut, summed before the last ReLU.

    Halving the map is the stride of the first convolution and of the shortcut, or, with `average`, a 2x2 average pool: after the
    first ReLU, and between the convolution and the norm of the shortcut.
    """

    def __init__(self, spec: ModelSpec, inputs: int, outputs: int, *, stride: int, average: bool) -> None:
        super().__init__()
        halve: nn.Module = nn.AvgPool2d(2) if stride == 2 and average else nn.Identity()
        stride = 1 if average else stride
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_layer(spec.norm, outputs)
        self.halve = halve
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm_layer(spec.norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, halve, norm_layer(spec.norm, outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """From (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        inner = self.halve(F.relu_(self.norm1(self.conv1(maps))))
        return F.relu_(self.norm2(self.conv2(inner)) + self.shortcut(maps))


class ResNet18(Network):
    """Stem of one convolution 3x3 at stride 1 without a pool, eight basic blocks, average pool, one linear layer.

    `resnet18` averages its last map over windows of 4x4 before it is flattened: 512 features at 32 pixels and 2048 at 64, at
    width 64. `resnet18_ap` flattens a map of 4x4 as it is (8192 features at 32 pixels, as in DC); a larger one, which the papers
    do not have, is averaged to 4x4 first.
    """

    def __init__(self, spec: ModelSpec, *, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        inputs = spec.width
        self.conv = nn.Conv2d(channels, spec.width, 3, padding=3 if image_size == 28 else 1, bias=False)
        self.norm = norm_layer(spec.norm, spec.width)
        blocks = []
        for outputs, stride in residual_stages(spec):
            blocks.append(BasicBlock(spec, inputs, outputs, stride=stride, average=spec.name == "resnet18_ap"))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self._add_classifier(spec, image_size, num_classes)

    def maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(F.relu_(self.norm(self.conv(images))))
        return maps
