"""The shapes inside every network: its convolutions, its last map, the images it can take. Torch-free.

The networks of `ncfm_core.models` are built from these tables and costs are counted from them, so the two cannot disagree.
Maps are square; images of 28 pixels are padded to 32 by the first convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from ncfm_core.errors import Problem
from ncfm_core.networks import NETWORKS
from ncfm_core.spec import ModelSpec

CHANNELS = (1, 3)
"""That images may have: grey or colour."""
POOLED_SIZE = 4
"""Side of the windows that ResNet-18 averages its last map over, and of the map that ResNet-18-AP averages its last one to."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One convolution of a chain, with its norm and ReLU, and the 2x2 pool after it where it has one."""

    channels: int
    kernel: int
    pool: bool


@dataclass(frozen=True, slots=True)
class Convolution:
    """One convolution at work."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    """Side of its output map."""

    @property
    def operations(self) -> int:
        """Of one image, two for a multiply and add."""
        return 2 * self.inputs * self.outputs * (self.kernel * self.size) ** 2


def chain(model: ModelSpec) -> tuple[Stage, ...]:
    """The stages of a network without branches; a ResNet has none of these."""
    width = model.width
    if model.name == "convnet":
        assert model.depth is not None
        return (Stage(width, 3, True),) * model.depth
    plan: tuple[tuple[int, int, bool], ...]
    if model.name == "alexnet":
        plan = ((2, 5, True), (3, 5, True), (4, 3, False), (3, 3, False), (3, 3, True))
    else:
        assert model.name == "vgg11"
        pools = (True, True, False, True, False, True, False, True)
        plan = tuple((times, 3, pool) for times, pool in zip((1, 2, 4, 4, 8, 8, 8, 8), pools, strict=True))
    return tuple(Stage(times * width, kernel, pool) for times, kernel, pool in plan)


def residual_stages(model: ModelSpec) -> tuple[tuple[int, int], ...]:
    """(channels, stride) of the basic blocks of a ResNet-18, two for each of four widths."""
    return tuple((model.width << stage, 2 if stage and not block else 1) for stage in range(4) for block in range(2))


def padded(image_size: int) -> int:
    """Side of the first map."""
    return 32 if image_size == 28 else image_size


def convolutions(model: ModelSpec, image_size: int, channels: int) -> tuple[Convolution, ...]:
    """All convolutions in the order in which they are computed.

    Args:
        model: the network.
        image_size: height and width of the images in pixels.
        channels: of the images.
    """
    size, found = padded(image_size), []
    if model.name not in ("resnet18", "resnet18_ap"):
        for stage in chain(model):
            found.append(Convolution(channels, stage.channels, stage.kernel, size))
            channels, size = stage.channels, size // 2 if stage.pool else size
        return tuple(found)
    found.append(Convolution(channels, model.width, 3, size))
    channels = model.width
    for outputs, stride in residual_stages(model):
        halved = _halved(model, size) if stride == 2 else size
        # With average pooling the stride-1 convolutions come first, on the larger map.
        first = size if model.name == "resnet18_ap" else halved
        found.append(Convolution(channels, outputs, 3, first))
        found.append(Convolution(outputs, outputs, 3, halved))
        if stride == 2:
            found.append(Convolution(channels, outputs, 1, first))
        channels, size = outputs, halved
    return tuple(found)


def _halved(model: ModelSpec, size: int) -> int:
    """A strided convolution rounds up, a pool down."""
    return -(-size // 2) if model.name == "resnet18" else size // 2


def last_map(model: ModelSpec, image_size: int) -> tuple[int, int]:
    """(channels, side) of the last map; a side of 0 means that such images are too small."""
    size = padded(image_size)
    if model.name in ("resnet18", "resnet18_ap"):
        for _ in range(3):
            size = _halved(model, size)
        return 8 * model.width, size
    stages = chain(model)
    return stages[-1].channels, size >> sum(stage.pool for stage in stages)


def pool_window(model: ModelSpec, image_size: int) -> int:
    """Side of the windows that the last map is averaged over before it is flattened; 1 leaves it as it is."""
    size = last_map(model, image_size)[1]
    if model.name == "resnet18":
        return min(POOLED_SIZE, size)
    return max(1, size // POOLED_SIZE) if model.name == "resnet18_ap" else 1


def num_features(model: ModelSpec, image_size: int) -> int:
    """Width of the flat embedding."""
    channels, size = last_map(model, image_size)
    return channels * (size // pool_window(model, image_size)) ** 2


def smallest_image(model: ModelSpec) -> int:
    """The least image size at which no map vanishes and no instance norm sees a single pixel, which it would turn into zero."""
    if model.name == "resnet18":
        return 9 if model.norm == "instance" else 1
    if model.name == "resnet18_ap":
        return 16 if model.norm == "instance" else 8
    return 1 << sum(stage.pool for stage in chain(model))


def whole_sizes(model: ModelSpec, image_size: int) -> tuple[int, ...]:
    """The nearest image sizes, below and above, of which no pool leaves out anything; empty where that is so already.

    Args:
        model: the network.
        image_size: height and width of the images in pixels, not too small for it.
    """
    if not _leaves_out(model, image_size):
        return ()
    below = (size for size in range(image_size - 1, smallest_image(model) - 1, -1) if not _leaves_out(model, size))
    above = (size for size in count(image_size + 1) if not _leaves_out(model, size))
    return (*islice(below, 1), next(above))


def _leaves_out(model: ModelSpec, image_size: int) -> bool:
    """Whether a pool, which rounds down, loses the last row and column of a map."""
    pools = {"resnet18": 0, "resnet18_ap": 3}.get(model.name)
    if pools is None:
        pools = sum(stage.pool for stage in chain(model))
    last = last_map(model, image_size)[1]
    return bool(padded(image_size) % (1 << pools) or last % pool_window(model, image_size))


def size_problem(where: str, model: ModelSpec, image_size: int) -> Problem | None:
    """Which field of a network makes images too small for it, and the way out; None where they are large enough.

    Args:
        where: path of the network in a submission, such as `evaluate.0.model`.
        model: the network.
        image_size: height and width of the images in pixels.
    """

    def fits(**changes: Any) -> bool:
        return smallest_image(model.model_copy(update=changes)) <= padded(image_size)

    if fits():
        return None
    if model.depth is not None:
        most = padded(image_size).bit_length() - 1
        message = f"too deep for images of {image_size} pixels"
        return Problem(f"{where}.depth", str(model.depth), message, f"Choose at most {most}.")
    norms = [norm for norm in NETWORKS[model.name].norms if fits(norm=norm)]
    if norms:
        message = f"erases the last map of {model.name}, which is one pixel for images of {image_size} pixels"
        return Problem(f"{where}.norm", repr(model.norm), message, f"Choose {' or '.join(norms)}.")
    others = [name for name in NETWORKS if name != "convnet" and fits(name=name, norm="group")]
    message = f"needs images of at least {smallest_image(model)} pixels, these have {image_size}"
    return Problem(f"{where}.name", repr(model.name), message, f"Choose one of: {', '.join(['convnet', *others])}.")
