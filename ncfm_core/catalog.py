"""What is known of each data set before anything is loaded: names, classes, sizes, bounds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from ncfm_core.errors import Problem, SpecError, shorten

DatasetName = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
PresetName = Literal["paper", "quick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """A data set as its authors publish it (or, for `digits`, as split here)."""

    name: DatasetName
    title: str
    num_classes: int
    channels: int
    image_size: int
    """Height and width in pixels, before padding."""
    num_train: int
    num_test: int
    smallest_class: int
    """Training images in the smallest class: the upper bound of IPC."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per-channel statistics of the training pixels in [0, 1]."""
    class_names: tuple[str, ...]
    flip: bool
    """Whether a mirrored image keeps its class (false for digits: methods that augment leave the flip out)."""
    default_preset: PresetName = "paper"
    presets: tuple[PresetName, ...] = ("paper", "quick")
    split: str = "published"
    files: tuple[str, ...] = field(default=())
    """Files looked for below the data folder, in torchvision's layout."""

    @property
    def depth(self) -> int:
        """Blocks of the ConvNet that leave a 4x4 map (2x2 for images of 8 pixels): 2 at 8x8, 3 at 28x28 and 32x32."""
        return 2 if self.image_size < 16 else 3


_DIGITS = tuple(str(digit) for digit in range(10))

DATASETS: dict[str, DatasetFacts] = {
    facts.name: facts
    for facts in (
        DatasetFacts(
            name="digits",
            title="scikit-learn digits, 8x8 grey",
            num_classes=10,
            channels=1,
            image_size=8,
            num_train=1297,
            num_test=500,
            smallest_class=118,
            mean=(0.3051,),
            std=(0.3756,),
            class_names=_DIGITS,
            flip=False,
            default_preset="quick",
            presets=("quick",),
            split="digits-1297-500",
        ),
        DatasetFacts(
            name="mnist",
            title="MNIST, 28x28 grey",
            num_classes=10,
            channels=1,
            image_size=28,
            num_train=60000,
            num_test=10000,
            smallest_class=5421,
            mean=(0.1307,),
            std=(0.3081,),
            class_names=_DIGITS,
            flip=False,
            files=tuple(
                f"MNIST/raw/{name}"
                for name in (
                    "train-images-idx3-ubyte",
                    "train-labels-idx1-ubyte",
                    "t10k-images-idx3-ubyte",
                    "t10k-labels-idx1-ubyte",
                )
            ),
        ),
        DatasetFacts(
            name="fashion-mnist",
            title="Fashion-MNIST, 28x28 grey",
            num_classes=10,
            channels=1,
            image_size=28,
            num_train=60000,
            num_test=10000,
            smallest_class=6000,
            mean=(0.2861,),
            std=(0.3530,),
            class_names=(
                "t-shirt",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle-boot",
            ),
            flip=True,
            files=tuple(
                f"FashionMNIST/raw/{name}"
                for name in (
                    "train-images-idx3-ubyte",
                    "train-labels-idx1-ubyte",
                    "t10k-images-idx3-ubyte",
                    "t10k-labels-idx1-ubyte",
                )
            ),
        ),
        DatasetFacts(
            name="cifar10",
            title="CIFAR-10, 32x32 colour",
            num_classes=10,
            channels=3,
            image_size=32,
            num_train=50000,
            num_test=10000,
            smallest_class=5000,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            class_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            flip=True,
            files=(
                *(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
                "cifar-10-batches-py/test_batch",
                "cifar-10-batches-py/batches.meta",
            ),
        ),
    )
}


def nearest(name: str, known: tuple[str, ...]) -> str:
    """A hint that names the nearest of the known names, or all of them where none is near."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def dataset_facts(name: str) -> DatasetFacts:
    """The catalog's entry.

    Raises:
        SpecError: the name is not in the catalog.
    """
    if name not in DATASETS:
        raise SpecError(Problem("dataset.name", shorten(name), "unknown data set", nearest(name, tuple(DATASETS))))
    return DATASETS[name]
