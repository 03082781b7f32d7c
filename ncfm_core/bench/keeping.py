"""How exactly a run is kept in its folder, so that it fits: which of teachers, images and moments are stored in fewer bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ncfm_core.bench.folder import MIB
from ncfm_core.bench.work import Work
from ncfm_core.errors import ResourcesError
from ncfm_core.models import build_model
from ncfm_core.rng import generator

SLACK_BYTES = MIB // 2
"""Of the folder, for headers, the record and small tensors."""
LEVELS = 65_535
"""Of an image stored as uint16: a step of 1.5e-5, far below what one update moves."""
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "none": 0}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Numbers that a run has to keep."""

    teachers: int
    """Teachers in the pool."""
    network: int
    """Values of one network."""
    images: int
    """Values of one synthetic set."""
    soft_labels: int
    """Values of one set's soft labels; 0 for hard ones alone."""
    sampler: int
    """Values of psi's log-scales."""
    seeds: int
    """Synthetic sets in all."""


def content_of(work: Work, num_seeds: int) -> Content:
    """What a run of that many seeds has to keep."""
    spec, dataset = work.spec, work.dataset
    network = build_model(
        spec.model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, draw=generator(0, "unused")
    )
    has_psi = spec.method.sampler == "scale_mixture"
    decoded = dataset.num_classes * spec.ipc * spec.method.factor**2
    return Content(
        teachers=spec.teachers.count,
        network=sum(tensor.numel() for tensor in network.state_dict().values()),
        images=dataset.num_classes * spec.ipc * math.prod(dataset.image_shape),
        soft_labels=decoded * dataset.num_classes if spec.method.labels == "soft" else 0,
        sampler=spec.method.num_components * network.num_features if has_psi else 0,
        seeds=num_seeds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What each kind of value is stored as."""

    images: str = "float32"
    moments: str = "float32"
    """Of the images' optimiser; `none`: it starts anew after a cut."""
    teachers: str = "float32"

    @property
    def is_exact(self) -> bool:
        """Whether a run that was cut has the bits of one that was not."""
        return self == Keeping()

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def peak_bytes(self, content: Content) -> int:
        """Most bytes that the folder holds at any time.

        Teachers stay to the end; finished sets gather; and one thing is under way: the last teacher (with two moments at
        most), a distillation (with two moments of the images, and psi with its own two), or the last set, just finished.
        """
        one_set = content.images * WIDTH[self.images] + content.soft_labels * WIDTH["float32"]
        teacher = content.network * WIDTH[self.teachers]
        last_teacher = (content.teachers - 1) * teacher + 3 * content.network * WIDTH["float32"]
        image = WIDTH[self.images] + 2 * WIDTH[self.moments]
        distillation = content.images * image + 3 * content.sampler * WIDTH["float32"]
        others = (content.seeds - 1) * one_set
        return others + max(last_teacher, content.teachers * teacher + max(distillation, one_set))

    def keep_distillation(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of `Distillation`, as it is stored."""
        kept = {}
        for name, tensor in state.items():
            if name == "images":
                kept[name] = self._keep_images(tensor)
            elif not name.startswith("optimizer."):
                kept[name] = tensor
            elif self.moments != "none":
                kept[name] = _lowered(tensor, self.moments)
        return kept

    def keep_set(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A finished set (`synthetic.to_state`), as it is stored."""
        return {name: self._keep_images(tensor) if name == "images" else tensor for name, tensor in state.items()}

    def keep_teacher(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained end of a teacher, as it is stored."""
        return {name: _lowered(tensor, self.teachers) for name, tensor in weights.items()}

    def _keep_images(self, images: Tensor) -> Tensor:
        if self.images == "float32":
            return images
        # Clamped as the next step would do first of all.
        return images.clamp(0, 1).mul(LEVELS).round().to(torch.int32).to(torch.uint16)


def restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was stored in fewer bytes, as float32 again."""
    return {name: _raised(tensor) for name, tensor in stored.items()}


CHOICES = (
    Keeping(),
    Keeping(moments="bfloat16"),
    Keeping(images="uint16", moments="bfloat16"),
    Keeping(images="uint16", moments="none"),
    Keeping(images="uint16", moments="bfloat16", teachers="float16"),
    Keeping(images="uint16", moments="none", teachers="float16"),
)
"""From exact to small."""


def choose_keeping(content: Content, limit_bytes: int) -> Keeping:
    """The most exact way that fits.

    Args:
        content: what has to be kept.
        limit_bytes: all files of the folder together.

    Raises:
        ResourcesError: none fits.
    """
    fitting = [each for each in CHOICES if each.peak_bytes(content) + SLACK_BYTES <= limit_bytes]
    if not fitting:
        least = min(each.peak_bytes(content) for each in CHOICES) + SLACK_BYTES
        raise ResourcesError.of(
            "--folder-mib",
            limit_bytes // MIB,
            f"the run needs {-(-least // MIB)} MiB in its folder",
            "Raise it, or choose fewer --teachers, fewer seeds or a lower --ipc.",
        )
    return fitting[0]


def _lowered(tensor: Tensor, name: str) -> Tensor:
    # Counters stay as they are: an optimiser's step is a float too, but not a moment.
    return tensor.to(_DTYPES[name]) if tensor.is_floating_point() and tensor.ndim else tensor


def _raised(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint16:
        return tensor.to(torch.int32).to(torch.float32).div(LEVELS)
    return tensor.to(torch.float32) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
