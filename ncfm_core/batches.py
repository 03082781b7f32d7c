"""What a training sees at each step: which images, how augmented and mixed, and the loss on them.

All of it is drawn from (seed, stream, step) alone: networks see the same whether they are trained apart or at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm_core import augment
from ncfm_core.augment import Augmentation, Mix
from ncfm_core.datasets import Dataset, Images
from ncfm_core.errors import SpecError
from ncfm_core.rng import generator, moved_together
from ncfm_core.spec import TrainingSpec


@dataclass(frozen=True, slots=True)
class Draw:
    """What one network draws for one step, on the CPU."""

    chosen: Tensor
    """int64 of shape (n,)."""
    augmentation: Augmentation
    mix: Mix | None

    def tensors(self) -> list[Tensor]:
        """What belongs where the images are."""
        return [self.chosen, *self.augmentation.tensors(), *([] if self.mix is None else [self.mix.order])]

    def replaced(self, tensors: Iterator[Tensor]) -> Draw:
        """The same with others in the place of `tensors()`."""
        chosen, augmentation = next(tensors), self.augmentation.replaced(tensors)
        return Draw(chosen, augmentation, None if self.mix is None else replace(self.mix, order=next(tensors)))


@dataclass(frozen=True, slots=True)
class Batch:
    """Images and what they are; with a leading axis of k where k networks are trained at once."""

    images: Tensor
    """Normalised, augmented and mixed, shape (n, channels, H, W)."""
    labels: Tensor
    """int64 of shape (n,), or teacher logits of shape (n, classes) where the loss compares with those."""
    others: Tensor | None
    """The same of what was pasted in; None where nothing was mixed."""
    share: Tensor | float
    """Of the loss on `labels`; `others` have the rest."""

    def split(self, size: int, axis: int = 0) -> Iterator[Batch]:
        """In pieces of at most `size` images; the mean of their losses, weighted by images, is the batch's.

        Args:
            size: images of a piece.
            axis: of the images: 0, or 1 where k networks are trained at once.
        """
        others = repeat(None) if self.others is None else self.others.split(size, axis)
        pieces = zip(self.images.split(size, axis), self.labels.split(size, axis), others, strict=False)
        return (Batch(images, labels, other, self.share) for images, labels, other in pieces)


class Batches:
    """Labelled images and the recipe that they are trained on by."""

    def __init__(
        self,
        images: Tensor | Images,
        labels: Tensor,
        dataset: Dataset,
        *,
        spec: TrainingSpec,
        targets: Tensor | None = None,
    ) -> None:
        """
        Args:
            images: shape (N, channels, H, W), uint8 or float in [0, 1]; may lie in a file.
            labels: int64 of shape (N,).
            dataset: whose statistics normalise the images.
            spec: the recipe.
            targets: teacher logits, float32 of shape (N, classes); for losses that compare with them.

        Raises:
            SpecError: the loss needs targets and there are none.
        """
        if spec.needs_soft_labels and targets is None:
            message = "needs soft labels (teacher logits), and these images have none"
            raise SpecError.of("training.loss", spec.loss, message, "Use cross_entropy.")
        # Small sets are normalised once; large ones stay bytes and are normalised batch by batch.
        self._dataset, self._normalised = dataset, len(images) <= spec.batch_size
        self._images = dataset.normalise(images[:]) if self._normalised else images
        self._labels = targets if spec.needs_soft_labels and targets is not None else labels
        self.spec, self.device = spec, labels.device
        self.batch_size = min(spec.batch_size, len(images))
        self.steps_per_epoch = -(-len(images) // self.batch_size)
        self.total = spec.epochs * self.steps_per_epoch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self._dataset.image_shape

    @property
    def shown(self) -> int:
        """Images that one network sees in all its steps."""
        return self.spec.epochs * len(self._labels)

    def example(self) -> Tensor:
        """One image as a network sees it, without augmentation, shape (1, channels, H, W)."""
        return self._images[:1] if self._normalised else self._dataset.normalise(self._images[:1])

    def orders(self, epoch: int, *, seed: int, streams: Sequence[str]) -> Tensor:
        """In which the images come in an epoch, for each stream: int64 of shape (k, N), on the CPU."""
        draws = [generator(seed, f"{stream}/order", epoch) for stream in streams]
        return torch.stack([torch.randperm(len(self._labels), generator=draw) for draw in draws])

    def draw(self, order: Tensor, step: int, *, seed: int, stream: str) -> Draw:
        """The draw of a step, given the order of its epoch."""
        place = step % self.steps_per_epoch
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        draw = generator(seed, f"{stream}/augment", step)
        augmentation = augment.draw(self.spec.augment, draw, len(chosen))
        return Draw(
            chosen, augmentation, augment.draw_cutmix(self.spec.cutmix, len(chosen), self.image_shape[1:], draw)
        )

    def batch(self, draw: Draw) -> Batch:
        """The batch of one network."""
        there = draw.replaced(iter(moved_together(draw.tensors(), self.device)))
        images, labels = self._taken(draw.chosen, there.chosen), self._labels[there.chosen]
        images = there.augmentation(images)
        if there.mix is None:
            return Batch(images, labels, None, 1.0)
        return Batch(there.mix(images), labels, labels[there.mix.order], there.mix.share)

    def stacked(self, draws: Sequence[Draw]) -> Batch:
        """The batches of k networks, for every tensor a leading axis of k."""
        chosen = torch.stack([draw.chosen for draw in draws])
        share = torch.tensor([draw.mix.share if draw.mix else 1.0 for draw in draws])
        tensors = iter(moved_together([share, *(each for draw in draws for each in draw.tensors())], self.device))
        share, there = next(tensors), [draw.replaced(tensors) for draw in draws]
        chosen_there = torch.stack([draw.chosen for draw in there])
        images, labels = self._taken(chosen.flatten(), chosen_there.flatten()), self._labels[chosen_there]
        images = images.unflatten(0, chosen.shape)
        images = augment.each([draw.augmentation for draw in there], images)
        mixes = [draw.mix for draw in there]
        if not any(mixes):
            return Batch(images, labels, None, 1.0)
        mixed = torch.stack([mix(batch) if mix else batch for mix, batch in zip(mixes, images, strict=True)])
        others = torch.stack([each[mix.order] if mix else each for mix, each in zip(mixes, labels, strict=True)])
        return Batch(mixed, labels, others, share)

    def _taken(self, chosen: Tensor, there: Tensor) -> Tensor:
        """Normalised images by index, given on the CPU, which reads a file, and on the device."""
        in_file = isinstance(self._images, Images) and self._images.mapped
        images = self._images[chosen if in_file else there]
        return images if self._normalised else self._dataset.normalise(images)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a batch: a scalar, or of shape (k,) where k networks are trained at once.

        Args:
            logits: shape (n, classes) or (k, n, classes).
            batch: what they were computed from.
        """
        loss = self._loss(logits, batch.labels)
        if batch.others is None:
            return loss
        return loss * batch.share + self._loss(logits, batch.others) * (1 - batch.share)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        match self.spec.loss:
            case "l1_logits":
                return (logits - labels).abs().mean(dim=(-2, -1))
            case "soft_cross_entropy":
                return -(labels.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(-1)
            case "kl":
                given = labels.log_softmax(-1)
                return (given.exp() * (given - logits.log_softmax(-1))).sum(-1).mean(-1)
            case _:
                if logits.ndim == 2:
                    return F.cross_entropy(logits, labels)
                losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                return losses.view(labels.shape).mean(-1)
