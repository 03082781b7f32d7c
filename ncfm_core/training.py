"""The one supervised loop: teachers, students and full-data networks. All data on the device, no loader processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core import augment
from ncfm_core.datasets import Dataset, Images
from ncfm_core.errors import CheckpointError
from ncfm_core.progress import Progress
from ncfm_core.rng import generator
from ncfm_core.spec import TrainingSpec

REPORT_EVERY = 50
"""Steps between two reports; each costs one wait for the device."""
MOMENTUM = 0.9
TEST_BATCH = 1000


class Training:
    """One network, trained step by step on labelled images.

    Everything that is drawn depends on (seed, stream, step) alone, so `state` and `load_state` are all it takes to go on with the
    same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | Images,
        labels: Tensor,
        dataset: Dataset,
        *,
        spec: TrainingSpec,
        seed: int,
        stream: str,
    ) -> None:
        """
        Args:
            model: on the images' device; changed in place.
            images: shape (N, channels, H, W), uint8 or float in [0, 1]; or those of a data set, wherever they are.
            labels: int64 of shape (N,).
            dataset: whose statistics normalise the images.
            spec: the recipe.
            seed: of everything drawn.
            stream: name of this training, apart from all others of the seed.
        """
        self.model, self.spec, self.seed, self.stream = model, spec, seed, stream
        self.labels = labels
        # Small sets are normalised once; large ones stay bytes and are normalised batch by batch.
        self._dataset, self._normalised = dataset, len(images) <= spec.batch_size
        self.images = dataset.normalise(images[:]) if self._normalised else images
        self.batch_size = min(spec.batch_size, len(images))
        self.steps_per_epoch = -(-len(images) // self.batch_size)
        self.total = spec.epochs * self.steps_per_epoch
        self.step = 0
        self.optimizer = _optimizer(model.parameters(), spec)
        self._order = torch.empty(0, dtype=torch.int64)

    def run(self, until: int | None = None) -> Iterator[Progress]:
        """Train from `step` to `until` (all of it by default)."""
        until = self.total if until is None else until
        recent = torch.zeros((), device=self.labels.device)
        counted = 0
        while self.step < until:
            recent += self._advance()
            counted += 1
            if self.step == until or self.step % REPORT_EVERY == 0:
                yield Progress(self.step, self.total, "step", {"loss": recent.item() / counted})
                recent.zero_()
                counted = 0

    def _advance(self) -> Tensor:
        """One optimiser step; its loss, detached, on the device."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0 or not len(self._order):
            order = torch.randperm(len(self.labels), generator=generator(self.seed, f"{self.stream}/order", epoch))
            self._order = order.to(self.labels.device)
        chosen = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        draw = generator(self.seed, f"{self.stream}/augment", self.step)
        images, labels = self.images[chosen], self.labels[chosen]
        if not self._normalised:
            images = self._dataset.normalise(images)
        images = augment.draw(self.spec.augment, draw, len(images))(images)
        images, other_labels, share = augment.cutmix(images, labels, self.spec.cutmix, draw)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, epoch)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels) * share
        if share < 1:
            loss = loss + F.cross_entropy(logits, other_labels) * (1 - share)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors on the CPU."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()}
        state["step"] = torch.tensor(self.step)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of another training.
        """
        try:
            self.model.load_state_dict(part(state, "model."))
            load_optimizer_state(self.optimizer, part(state, "optimizer."))
            self.step = int(state["step"])
        except (KeyError, RuntimeError, IndexError) as error:
            raise CheckpointError.of(
                "checkpoint", None, f"does not fit this training: {error}", "Start afresh."
            ) from None
        self._order = torch.empty(0, dtype=torch.int64)


def learning_rate(spec: TrainingSpec, epoch: int) -> float:
    """The rate in an epoch, counted from 0."""
    passed = sum(epoch >= round(milestone * spec.epochs) for milestone in spec.milestones)
    return spec.lr * spec.gamma**passed


def _optimizer(parameters: Iterable[nn.Parameter], spec: TrainingSpec) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=spec.lr, momentum=MOMENTUM, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy on the test images, in percent, in evaluation mode; the model's own mode comes back afterwards."""
    right = torch.zeros((), dtype=torch.int64, device=dataset.device)
    training = model.training
    model.eval()
    for start in range(0, len(dataset.test_labels), TEST_BATCH):
        logits = model(dataset.normalise(dataset.test[start : start + TEST_BATCH]))
        right += (logits.argmax(1) == dataset.test_labels[start : start + TEST_BATCH]).sum()
    model.train(training)
    return 100 * right.item() / len(dataset.test_labels)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments and counters as flat tensors, `<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave; rates and other settings stay as they are."""
    nested: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, entry = name.split(".", 1)
        nested.setdefault(int(index), {})[entry] = value.clone()
    optimizer.load_state_dict({"state": nested, "param_groups": optimizer.state_dict()["param_groups"]})
