"""The one supervised loop: teachers, students and full-data networks. All data on the device, no loader processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ncfm_core.batches import Batch, Batches
from ncfm_core.datasets import Dataset, Images
from ncfm_core.devices import in_halves, told, tried_again
from ncfm_core.errors import CheckpointError, OutOfMemoryError
from ncfm_core.execution import BACKWARD_FORWARDS, compiled_form, compiling_pays, fallen_back, probe
from ncfm_core.models.probing import largest_map, separable
from ncfm_core.progress import Progress, never
from ncfm_core.spec import TrainingSpec

CPU_CHUNK_BYTES = 4 << 20
"""Largest activation of what goes through a network at a time on a CPU: larger ones leave its caches between operations."""
REPORT_EVERY = 50
"""Steps between two reports; each costs one wait for the device."""
MOMENTUM = 0.9
CPU_FORWARD_BATCH = 100
"""Images in a forward without gradients on a CPU: three times as fast as 1000, whose feature maps leave the cache."""
CUDA_FORWARD_BATCH = 1000
"""The same on a GPU, at most."""
CUDA_FORWARD_BYTES = 512 << 20
"""Largest activation of such a forward on a GPU, where about three of them are held at once; 1000 images of 32x32 have it at
width 128."""


def _too_much() -> OutOfMemoryError:
    message = "the images and the network do not fit the memory of the device"
    return OutOfMemoryError.of("model.width", None, message, "Lower it, or the image size.")


class Training:
    """One network, trained step by step on labelled images.

    Everything that is drawn depends on (seed, stream, step) alone, so `state` and `load_state` are all it takes to go on with the
    same bits. Whether the network goes through `torch.compile` may move the last bits: a state records it, and what goes on from
    that keeps it.
    """

    @told(_too_much)
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
        targets: Tensor | None = None,
        compiled: bool | None = None,
        seconds: float | None = None,
        may_fall_back: bool | None = None,
        field: str = "training",
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
            targets: teacher logits, float32 of shape (N, classes); for losses that compare with them.
            compiled: whether the network goes through `torch.compile`, if it is one that may; None where it pays.
            seconds: that are left for it, for that choice; None for as many as it takes.
            may_fall_back: whether it is eager after all where the compiler fails at the first step; None if `compiled` is.
            field: where the recipe stands in a submission, for errors.

        Raises:
            SpecError: the loss needs targets and there are none.
            OutOfMemoryError: the images do not fit the memory.
        """
        self.model, self.spec, self.seed, self.stream, self._field = model, spec, seed, stream, field
        self._batches = Batches(images, labels, dataset, spec=spec, targets=targets)
        self.batch_size, self.steps_per_epoch = self._batches.batch_size, self._batches.steps_per_epoch
        self.total = self._batches.total
        self._chunk = images_at_a_time(model, self._batches)
        self.compiled = to_compile(model, self._batches, compiled, seconds=seconds)
        """Whether the network goes through `torch.compile`."""
        self._may_fall_back = compiled is None if may_fall_back is None else may_fall_back
        self.compile_error = ""
        """Why the network is eager although it was to be compiled, in one line; empty where that is not so."""
        self._forward: Callable[[Tensor], Tensor] | None = None
        self.step = self.halvings = 0
        self.optimizer = make_optimizer(model.parameters(), spec)
        self._order = torch.empty(0, dtype=torch.int64)

    def run(self, until: int | None = None, *, pause: Callable[[], bool] = never) -> Iterator[Progress]:
        """Train from `step` to `until` (all of it by default), or to the first step after which `pause` says so.

        A step that runs out of memory is tried once more with pieces of a batch that are half as large; `halvings` counts that.

        Raises:
            OutOfMemoryError: a step does not fit the memory, even so.
        """
        until = self.total if until is None else min(until, self.total)
        recent = torch.zeros((), device=self._batches.device)
        counted = 0
        while self.step < until:
            recent += self._compiled_step() if self.compiled else self._advance()
            counted += 1
            if (paused := pause()) or self.step == until or self.step % REPORT_EVERY == 0:
                yield Progress(self.step, self.total, "step", {"loss": recent.item() / counted})
                recent.zero_()
                counted = 0
            if paused:
                return

    def _compiled_step(self) -> Tensor:
        """One step where it is compiled; the very first one is made again, eager, if that fails and nobody asked for it."""
        try:
            return self._advance()
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways; what is not theirs happens again.
            self.compile_error = fallen_back(error, may=self._may_fall_back and self.step == 0)
        self.compiled, self._forward = False, None
        return self._advance()

    def _advance(self) -> Tensor:
        """One optimiser step; its loss, detached, on the device."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0 or not len(self._order):
            self._order = self._batches.orders(epoch, seed=self.seed, streams=(self.stream,))[0]
        draw = self._batches.draw(self._order, self.step, seed=self.seed, stream=self.stream)
        with told(self._full):
            batch = self._batches.batch(draw)
        set_rate(self.optimizer, self.spec, epoch, is_first=place == 0)
        device = self._batches.device
        total = tried_again(lambda: self._gradient(batch), halve=self._halve, full=self._full, device=device)
        with told(self._full):
            self.optimizer.step()
        self.step += 1
        return total

    def _gradient(self, batch: Batch) -> Tensor:
        """The parameters' gradient, piece by piece of a batch; its loss, detached, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._batches.device)
        # Made here, as a training that is only asked for its weights needs no compiler.
        self._forward = self._forward or (compiled_form(self.model) if self.compiled else self.model)
        for piece in batch.split(self._chunk):
            # What is left of a batch stays eager: another size would be compiled apart, for more than such few images give back.
            forward = self._forward if len(piece.images) == self._chunk else self.model
            loss = self._batches.loss(forward(piece.images), piece) * (len(piece.images) / len(batch.images))
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def _halve(self) -> bool:
        """Smaller pieces from now on; False where a batch cannot be cut, or not any more."""
        if self._chunk == 1 or not separable(self.model):
            return False
        self._chunk, self.halvings = self._chunk // 2, self.halvings + 1
        return True

    def _full(self) -> OutOfMemoryError:
        if separable(self.model):
            pieces, norm = f", even in pieces of {min(self._chunk, self.batch_size)}", ""
        else:
            pieces, norm = ", and with batch norm it cannot be cut", ", or take another model.norm"
        return OutOfMemoryError.of(
            f"{self._field}.batch_size",
            self.spec.batch_size,
            f"a step on {self.batch_size} images does not fit the memory of {self._batches.device}{pieces}",
            f"Lower it or model.width{norm}.",
        )

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors on the CPU."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()}
        state |= {"step": torch.tensor(self.step), "compiled": torch.tensor(int(self.compiled))}
        state["halvings"] = torch.tensor(self.halvings)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, compiled or not as it was, with pieces as small; one that does not say was not, and had whole ones.

        Raises:
            CheckpointError: it is of another training.
        """
        try:
            self.model.load_state_dict(part(state, "model."))
            load_optimizer_state(self.optimizer, part(state, "optimizer."))
            self.step, self.compiled = int(state["step"]), bool(state.get("compiled", False))
            self._may_fall_back = False
            self.halvings = int(state.get("halvings", 0))
        except (KeyError, RuntimeError, IndexError) as error:
            raise CheckpointError.of(
                "checkpoint", None, f"does not fit this training: {error}", "Start afresh."
            ) from None
        self._chunk = max(1, images_at_a_time(self.model, self._batches) >> self.halvings)
        self._order, self._forward = torch.empty(0, dtype=torch.int64), None


def to_compile(
    model: nn.Module,
    batches: Batches,
    asked: bool | None = None,
    *,
    trainings: int = 1,
    seconds: float | None = None,
) -> bool:
    """Whether to train a network through `torch.compile`: where it pays, over all trainings that share what is compiled.

    Networks with batch statistics stay eager: their running statistics are written in the forward pass.

    Args:
        model: one network.
        batches: what it is trained on.
        asked: what the caller wants; None for what pays.
        trainings: how many such networks are trained.
        seconds: that are left for them; None for as many as they take.
    """
    if asked is not None or not separable(model):
        return bool(asked) and separable(model)
    return compiling_pays(operations_of(model, batches) * trainings, batches.device, seconds)


def operations_of(model: nn.Module, batches: Batches) -> float:
    """Floating-point operations of a whole training, forward and backward."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    *_, operations = probe(
        lambda weights, images: torch.func.functional_call(model, weights, (images,)),
        weights,
        batches.image_shape,
        batches.device,
    )
    return (1 + BACKWARD_FORWARDS) * operations * batches.shown


def images_at_a_time(model: nn.Module, batches: Batches) -> int:
    """Images of a batch that go forward and backward at a time; their gradients add up to the batch's."""
    if batches.device.type != "cpu" or not separable(model):
        return batches.batch_size
    return min(batches.batch_size, max(1, CPU_CHUNK_BYTES // largest_map(model, batches.example())))


def milestones_passed(spec: TrainingSpec, epoch: int) -> int:
    """Milestones at or before an epoch, counted from 0."""
    return sum(epoch >= round(milestone * spec.epochs) for milestone in spec.milestones)


def learning_rate(spec: TrainingSpec, epoch: int) -> float:
    """The rate in an epoch, counted from 0."""
    return spec.lr * spec.gamma ** milestones_passed(spec, epoch)


def set_rate(optimizer: torch.optim.Optimizer, spec: TrainingSpec, epoch: int, *, is_first: bool) -> None:
    """Make an optimiser ready for a step of an epoch.

    Args:
        optimizer: from `make_optimizer`.
        spec: its recipe.
        epoch: counted from 0.
        is_first: whether the step is the first of its epoch, where an optimiser that the recipe resets forgets its moments.
    """
    if is_first and spec.reset_optimizer and milestones_passed(spec, epoch) > milestones_passed(spec, epoch - 1):
        optimizer.state.clear()
    rate = learning_rate(spec, epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(parameters: Iterable[Tensor], spec: TrainingSpec) -> torch.optim.Optimizer:
    """The optimiser of a recipe."""
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=spec.lr, momentum=MOMENTUM, weight_decay=spec.weight_decay)
    # Fused: one kernel for each parameter instead of nine, a tenth of a small student's step on a CPU.
    return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)


def forward_batch(network: nn.Module, image: Tensor, most: int | None = None) -> int:
    """Images to put through a network at a time where no gradients are asked for; on a GPU as many as the largest map allows.

    Args:
        network: in evaluation mode.
        image: one of them, shape (1, channels, H, W), on the compute device.
        most: upper bound; None for that of the device.
    """
    if image.device.type == "cpu":
        return most or CPU_FORWARD_BATCH
    return max(1, min(most or CUDA_FORWARD_BATCH, CUDA_FORWARD_BYTES // largest_map(network, image)))


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy on the test images, in percent, in evaluation mode; the model's own mode comes back afterwards.

    Raises:
        OutOfMemoryError: so few images as a batch has do not fit the memory, nor do half as many.
    """
    training = model.training
    model.eval()
    try:
        with told(lambda: _test_full(1, dataset.device)):
            size = forward_batch(model, dataset.normalise(dataset.test[:1]))
        right = in_halves(
            lambda size: _right(model, dataset, size),
            size,
            full=lambda size: _test_full(size, dataset.device),
            device=dataset.device,
        )
    finally:
        model.train(training)
    return 100 * right / len(dataset.test_labels)


def _right(model: nn.Module, dataset: Dataset, size: int) -> int:
    """Test images that a network tells, so many at a time."""
    right = torch.zeros((), dtype=torch.int64, device=dataset.device)
    for start in range(0, len(dataset.test_labels), size):
        logits = model(dataset.normalise(dataset.test[start : start + size]))
        right += (logits.argmax(1) == dataset.test_labels[start : start + size]).sum()
    return int(right.item())


def _test_full(size: int, device: torch.device) -> OutOfMemoryError:
    message = f"{size} test images at once do not fit the memory of {device}"
    return OutOfMemoryError.of("model.width", None, message, "Lower it, or the image size.")


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
