"""Differentiable siamese augmentation (DSA, arXiv 2102.08259) as functions of images and drawn parameters.

Nothing is drawn while an augmentation is applied, so the same one can be laid over real and synthetic images (siamese), now and
again later (reuse). Images are normalised, of shape (N, channels, H, W); the zero that fills borders is the mean colour.
Parameters are uniform numbers u in [0, 1) of shape (n, k), where n is 1 (shared by the batch) or N (each image its own). They are
drawn on the CPU. A shared flip or crop is decided there; all other parameters are read on the images' device, where
`Augmentation.to` brings them in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm_core.rng import moved, moved_together
from ncfm_core.spec import AugmentSpec

CROP_RATIO = 0.125
CUTOUT_RATIO = 0.5
SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
DECIDED = ("flip", "crop")
"""Operations that the host decides where the batch shares their parameters: to ask a GPU for those would be to wait for it."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Operations in their order, each with its parameters u."""

    operations: tuple[tuple[str, Tensor], ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented images of the same shape; differentiable in the images."""
        for name, parameters in self.operations:
            images = OPERATIONS[name](images, _at(name, parameters, images.device))
        return images

    def to(self, device: torch.device) -> Augmentation:
        """The same with its parameters on a device, in one copy that nothing waits for; for images there."""
        return self.replaced(iter(moved_together(self.tensors(), device)))

    def tensors(self) -> list[Tensor]:
        """The parameters that belong where the images are."""
        return [parameters for name, parameters in self.operations if not _decided(name, parameters)]

    def replaced(self, tensors: Iterator[Tensor]) -> Augmentation:
        """The same with others in the place of `tensors()`."""
        return Augmentation(
            tuple(
                (name, parameters if _decided(name, parameters) else next(tensors))
                for name, parameters in self.operations
            )
        )


def draw(spec: AugmentSpec, draw_from: torch.Generator, num: int = 1) -> Augmentation:
    """Draw an augmentation.

    Args:
        spec: policy `single` draws one of the groups for the whole call; `stack` takes flip, colour, one of crop, scale and
            rotate, and cutout, as far as they are named (methods DC, DM: single; NCFM: stack).
        draw_from: generator on the CPU.
        num: 1 for parameters shared by the batch, else the number of images.
    """
    if spec.policy == "none" or not spec.ops:
        return Augmentation(())
    if spec.policy == "single":
        names = [spec.ops[int(torch.randint(len(spec.ops), (), generator=draw_from))]]
    else:
        geometric = [name for name in ("crop", "scale", "rotate") if name in spec.ops]
        names = [name for name in ("flip", "color") if name in spec.ops]
        if geometric:
            names.append(geometric[int(torch.randint(len(geometric), (), generator=draw_from))])
        names += [name for name in ("cutout",) if name in spec.ops]
    return Augmentation(tuple((name, torch.rand((num, NUM_PARAMETERS[name]), generator=draw_from)) for name in names))


def each(augmentations: Sequence[Augmentation], images: Tensor) -> Tensor:
    """Lay one augmentation over each of several batches, as few operations at a time as will do.

    Args:
        augmentations: k of one specification, with parameters for each image.
        images: shape (k, N, channels, H, W).

    Returns:
        The same shape.
    """
    for operations in zip(*(augmentation.operations for augmentation in augmentations), strict=True):
        groups: dict[str, list[int]] = {}
        for index, (name, _) in enumerate(operations):
            groups.setdefault(name, []).append(index)
        parts: list[Tensor] = [images] * len(operations)
        for name, members in groups.items():
            parameters = torch.cat([operations[index][1] for index in members])
            # Stacked, as a list for an index would be copied to a GPU first.
            chosen = images if len(members) == len(operations) else torch.stack([images[index] for index in members])
            parameters = _at(name, parameters, images.device)
            changed = OPERATIONS[name](chosen.flatten(0, 1), parameters).view(chosen.shape)
            for index, batch in zip(members, changed, strict=True):
                parts[index] = batch
        images = changed if len(groups) == 1 else torch.stack(parts)
    return images


def _decided(name: str, parameters: Tensor) -> bool:
    """Whether the host decides an operation."""
    return name in DECIDED and len(parameters) == 1


def _at(name: str, parameters: Tensor, device: torch.device) -> Tensor:
    """Parameters where their operation reads them."""
    return parameters if _decided(name, parameters) else moved(parameters, device)


def _column(parameters: Tensor, index: int) -> Tensor:
    return parameters[:, index].view(-1, 1, 1, 1)


def flip(images: Tensor, parameters: Tensor) -> Tensor:
    """Mirror left to right with probability 1/2."""
    if len(parameters) == 1:
        return images.flip(3) if parameters[0, 0] < 0.5 else images
    return torch.where(_column(parameters, 0) < 0.5, images.flip(3), images)


def color(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness x + (u - 1/2); saturation (x - m) 2u + m, m over channels; contrast (x - m)(u + 1/2) + m, m over the image."""
    images = images + (_column(parameters, 0) - 0.5)
    if images.shape[1] > 1:
        grey = images.mean(dim=1, keepdim=True)
        images = torch.lerp(grey, images, 2 * _column(parameters, 1))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _column(parameters, 2) + 0.5)


def crop(images: Tensor, parameters: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the size each way, filled with zero."""
    height, width = images.shape[2:]
    reach = [int(CROP_RATIO * size + 0.5) for size in (height, width)]
    shifts = [(parameters[:, axis] * (2 * reach[axis] + 1)).floor().long() for axis in (0, 1)]
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    if len(parameters) == 1:
        top, left = (int(shift) for shift in shifts)
        return padded[:, :, top : top + height, left : left + width]
    rows = shifts[0].view(-1, 1, 1, 1) + torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = shifts[1].view(-1, 1, 1, 1) + torch.arange(width, device=images.device).view(1, 1, 1, -1)
    each = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[each, channel, rows, columns]


def cutout(images: Tensor, parameters: Tensor) -> Tensor:
    """A zero square of half the size around a uniform centre, clipped at the borders."""
    inside = []
    for axis, size in ((0, images.shape[2]), (1, images.shape[3])):
        side = int(CUTOUT_RATIO * size + 0.5)
        start = (parameters[:, axis] * (size + (1 - side % 2))).floor() - side // 2
        place = torch.arange(size, device=images.device).view(1, -1) - start.view(-1, 1)
        inside.append((place >= 0) & (place < side))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images * (~hole).unsqueeze(1)


def _affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample bilinearly, zero outside; matrices of shape (n, 2, 2) map output to input coordinates."""
    theta = F.pad(matrices, (0, 1)).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def scale(images: Tensor, parameters: Tensor) -> Tensor:
    """Stretch each axis on its own by a factor in [1/1.2, 1.2)."""
    return _affine(images, torch.diag_embed(parameters * (SCALE_RATIO - 1 / SCALE_RATIO) + 1 / SCALE_RATIO))


def rotate(images: Tensor, parameters: Tensor) -> Tensor:
    """Turn by an angle in [-15, 15) degrees."""
    angle = (parameters[:, 0] - 0.5) * (2 * ROTATE_DEGREES * math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, torch.stack((cosine, -sine, sine, cosine), dim=1).view(-1, 2, 2))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flip": flip,
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "scale": scale,
    "rotate": rotate,
}
NUM_PARAMETERS = {"flip": 1, "color": 3, "crop": 2, "cutout": 2, "scale": 2, "rotate": 1}


@dataclass(frozen=True, slots=True)
class Mix:
    """CutMix of one batch: a box of each image is taken from another one."""

    order: Tensor
    """int64 of shape (N,): which image each box comes from."""
    box: tuple[slice, slice]
    """Rows and columns."""
    share: float
    """Of the area that stays, and so of the loss that the image's own label keeps."""

    def __call__(self, images: Tensor) -> Tensor:
        """The images with their boxes pasted in."""
        rows, columns = self.box
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[moved(self.order, images.device), :, rows, columns]
        return mixed


def draw_cutmix(probability: float, num: int, size: tuple[int, int], draw_from: torch.Generator) -> Mix | None:
    """CutMix (arXiv 1905.04899) of a batch with a permutation of itself, lambda ~ Beta(1, 1) = U(0, 1).

    Args:
        probability: of mixing at all.
        num: images in the batch.
        size: their height and width.
        draw_from: generator on the CPU.

    Returns:
        None where nothing is mixed.
    """
    if probability == 0:
        return None
    chance, keep, x, y = torch.rand(4, generator=draw_from).tolist()
    if chance >= probability:
        return None
    order = torch.randperm(num, generator=draw_from)
    height, width = size
    side = math.sqrt(1 - keep)
    top, bottom = (round(min(max(y * height + sign * side * height / 2, 0), height)) for sign in (-1, 1))
    left, right = (round(min(max(x * width + sign * side * width / 2, 0), width)) for sign in (-1, 1))
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mix(order, (slice(top, bottom), slice(left, right)), share)
