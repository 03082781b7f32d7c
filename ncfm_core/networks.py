"""What is known of each network: name, width and norms in the literature. Torch-free; docs/networks.md has the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NetworkName = Literal["convnet", "alexnet", "vgg11", "resnet18", "resnet18_ap"]
Norm = Literal["instance", "batch", "group", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """A network as the distillation literature has it."""

    name: NetworkName
    title: str
    width: int
    """What `ModelSpec.width` is there."""
    norms: tuple[Norm, ...]
    """Those it can have; the default is the first that suits the images, and the literature's is the first of all."""


NETWORKS: dict[str, NetworkFacts] = {
    facts.name: facts
    for facts in (
        NetworkFacts(name="convnet", title="ConvNet", width=128, norms=("instance", "group", "batch", "none")),
        NetworkFacts(name="alexnet", title="AlexNet", width=64, norms=("none", "instance", "group", "batch")),
        NetworkFacts(name="vgg11", title="VGG-11", width=64, norms=("instance", "group", "batch", "none")),
        NetworkFacts(name="resnet18", title="ResNet-18", width=64, norms=("instance", "group", "batch")),
        NetworkFacts(name="resnet18_ap", title="ResNet-18-AP", width=64, norms=("instance", "group", "batch")),
    )
}
