"""What is known of each data set before anything is loaded: names, classes, sizes, bounds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from ncfm_core.errors import Problem, SpecError, shorten
from ncfm_core.imagenet import SUBSETS

DatasetName = Literal[
    "digits",
    "mnist",
    "fashion-mnist",
    "svhn",
    "cifar10",
    "cifar100",
    "tiny-imagenet",
    "imagenette",
    "imagewoof",
    "imagefruit",
    "imagemeow",
    "imagesquawk",
    "imageyellow",
    "imagenet",
    "imagefolder",
]
PresetName = Literal["paper", "quick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """A data set as its authors publish it (or, for `digits`, as split here; for `imagefolder`, as far as its spec says)."""

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
    """Per-channel statistics of the training pixels in [0, 1], as the literature has them; empty: taken from the pixels."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty where the data's own files name the classes."""
    flip: bool
    """Whether a mirrored image keeps its class (false for digits: methods that augment leave the flip out)."""
    default_preset: PresetName = "paper"
    presets: tuple[PresetName, ...] = ("paper", "quick")
    split: str = "published"
    files: tuple[str, ...] = field(default=())
    """What is looked for below the data folder, in torchvision's layout where it has one."""
    wnids: tuple[str, ...] = ()
    """WordNet ids of the classes in the order of the labels, where they are a choice of ImageNet's."""
    origin: str = ""
    """How to get the files."""
    assumed: bool = False
    """Whether the counts are assumptions, good for an estimate: the inspection counts the data."""

    @property
    def depth(self) -> int:
        """Blocks of the ConvNet that leave a map of 3x3 to 5x5 (2x2 or 3x3 below 16 pixels).

        2 at 8, 3 at 28 and 32, 4 at 64, 5 at 128, 6 at 224 and 256, as in the literature.
        """
        return 2 if self.image_size < 16 else next((d for d, below in _DEPTHS if self.image_size < below), 6)


_DEPTHS = ((3, 48), (4, 96), (5, 192))
"""Depth of the ConvNet for images of fewer pixels than that."""
_DIGITS = tuple(str(digit) for digit in range(10))
_TORCHVISION = "torchvision fetches it: allow that with NCFM_ALLOW_DOWNLOAD=true, or put the files there."
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET = "Register at image-net.org, fetch ILSVRC2012 and unpack it into one folder for each class."


_SUBSET_TITLES: dict[DatasetName, str] = {
    "imagenette": "ImageNette",
    "imagewoof": "ImageWoof",
    "imagefruit": "ImageFruit",
    "imagemeow": "ImageMeow",
    "imagesquawk": "ImageSquawk",
    "imageyellow": "ImageYellow",
}


def _imagenet_subset(name: DatasetName, title: str) -> DatasetFacts:
    classes = SUBSETS[name]
    return DatasetFacts(
        name=name,
        title=f"{title}, 128x128 colour",
        num_classes=10,
        channels=3,
        image_size=128,
        num_train=13_000,
        num_test=500,
        smallest_class=732,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        class_names=tuple(classes.values()),
        flip=True,
        files=(f"{name}/train/<wnid>", f"{name}/val/<wnid>", "imagenet/train/<wnid>", "imagenet/val/<wnid>"),
        wnids=tuple(classes),
        origin=_IMAGENET,
        # ImageNet's classes have 732 to 1300 training images; copies of single classes have what they have.
        assumed=True,
    )


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
            origin=_TORCHVISION,
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
            origin=_TORCHVISION,
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
            origin=_TORCHVISION,
        ),
        DatasetFacts(
            name="cifar100",
            title="CIFAR-100, 32x32 colour",
            num_classes=100,
            channels=3,
            image_size=32,
            num_train=50000,
            num_test=10000,
            smallest_class=500,
            # Its own, as in DM and IDM; NCFM and MTT normalise it by CIFAR-10's.
            mean=(0.5071, 0.4866, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            class_names=(),
            flip=True,
            files=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
            origin=_TORCHVISION,
        ),
        DatasetFacts(
            name="svhn",
            title="SVHN, 32x32 colour",
            num_classes=10,
            channels=3,
            image_size=32,
            num_train=73257,
            num_test=26032,
            smallest_class=4659,
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            class_names=_DIGITS,
            flip=False,
            files=("train_32x32.mat", "test_32x32.mat"),
            origin=_TORCHVISION,
        ),
        DatasetFacts(
            name="tiny-imagenet",
            title="Tiny ImageNet, 64x64 colour",
            num_classes=200,
            channels=3,
            image_size=64,
            num_train=100_000,
            num_test=10_000,
            smallest_class=500,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            class_names=(),
            flip=True,
            files=("tiny-imagenet-200/train/<wnid>", "tiny-imagenet-200/val"),
            origin="Fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there.",
        ),
        *(_imagenet_subset(name, title) for name, title in _SUBSET_TITLES.items()),
        DatasetFacts(
            name="imagenet",
            title="ImageNet-1K, 64x64 colour",
            num_classes=1000,
            channels=3,
            image_size=64,
            num_train=1_281_167,
            num_test=50_000,
            smallest_class=732,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            class_names=(),
            flip=True,
            files=(
                "imagenet64/train_data_batch_<1 to 10>[.npz]",
                "imagenet64/val_data[.npz]",
                "imagenet/train/<wnid>",
                "imagenet/val/<wnid>",
            ),
            origin="Register at image-net.org and fetch the downsampled ImageNet64, or ILSVRC2012 in one folder for each class.",
        ),
        DatasetFacts(
            name="imagefolder",
            title="images in one folder for each class",
            num_classes=10,
            channels=3,
            image_size=64,
            num_train=10_000,
            num_test=2_000,
            smallest_class=1_000,
            mean=(),
            std=(),
            class_names=(),
            flip=True,
            split="as its folders say",
            origin="Name it with uri: a folder, .tar, .tar.gz or .zip that the cluster can read.",
            assumed=True,
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
