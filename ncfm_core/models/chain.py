"""Networks without branches: stages of [convolution, norm, ReLU] with a 2x2 pool after some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core.geometry import chain
from ncfm_core.models.network import Network, norm_layer
from ncfm_core.spec import ModelSpec


class Chain(Network):
    """The stages of `geometry.chain`, then one linear layer."""

    pool: Callable[[Tensor, int], Tensor]

    def __init__(self, spec: ModelSpec, *, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        stages = chain(spec)
        self._pools = tuple(stage.pool for stage in stages)
        inputs = (channels, *(stage.channels for stage in stages))
        # Two more pixels on each side make 32 of 28.
        extra = (2 if image_size == 28 else 0, *(0 for _ in stages))
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs[i], stage.channels, stage.kernel, padding=stage.kernel // 2 + extra[i])
            for i, stage in enumerate(stages)
        )
        self.norms = nn.ModuleList(norm_layer(spec.norm, stage.channels) for stage in stages)
        self._add_classifier(spec, image_size, num_classes)

    def maps(self, images: Tensor) -> Tensor:
        pool = type(self).pool
        for conv, norm, pools in zip(self.convs, self.norms, self._pools, strict=True):
            # In place: neither norm nor convolution needs its output for the backward pass, and fresh memory is slow on a CPU.
            images = F.relu_(norm(conv(images)))
            images = pool(images, 2) if pools else images
        return images
