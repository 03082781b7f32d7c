"""What a network is like to compute with, found by looking at it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def separable(network: nn.Module) -> bool:
    """Whether images pass through it each on its own: no statistics over a batch, nothing drawn in the forward."""
    batchwise = nn.modules.batchnorm._NormBase | nn.Dropout
    return not any(isinstance(module, batchwise) for module in network.modules()) and not list(network.buffers())


@torch.no_grad()
def largest_map(network: nn.Module, image: Tensor) -> int:
    """Bytes of the largest feature map of one image."""
    sizes: list[int] = []

    def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, nn.Conv2d)]
    network(image)
    for hook in hooks:
        hook.remove()
    return max(sizes, default=1)
