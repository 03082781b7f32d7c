"""Where matching networks come from: a pool of teachers, blended between their initial and their trained weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.devices import in_halves, require_device, told
from ncfm_core.errors import OutOfMemoryError, SpecError
from ncfm_core.models import Network, build_model
from ncfm_core.progress import Progress, never
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.training import Training, accuracy, forward_batch, part

Weights = dict[str, Tensor]
LABEL_BATCH = 256
"""Images labelled at once, at most."""


def _full() -> OutOfMemoryError:
    message = "the networks and the images do not fit the memory of the device"
    hint = "Lower it, teachers.count or NCFM_DATA_MEMORY_GIB, above which images stay in a file."
    return OutOfMemoryError.of("model.width", None, message, hint)


class TeacherTraining:
    """One teacher of a pool; which one depends on (seed, index) alone, so pools of 10 and 20 share ten."""

    @told(_full)
    def __init__(
        self,
        dataset: Dataset,
        model: ModelSpec,
        training: TrainingSpec,
        *,
        seed: int,
        index: int,
        device: torch.device,
        compiled: bool | None = None,
        seconds: float | None = None,
        may_fall_back: bool | None = None,
    ) -> None:
        """
        Args:
            dataset: the real data.
            model: the teacher's network.
            training: its recipe.
            seed: of the pool.
            index: of this teacher in the pool, from 0.
            device: where to train.
            compiled: whether it goes through `torch.compile`; None where it pays.
            seconds: that are left for it, for that choice; None for as many as it takes.
            may_fall_back: whether it is eager after all where the compiler fails at the first step; None if `compiled` is.

        Raises:
            SpecError: images are too small for the network, or the recipe's loss compares with teacher logits.
            ResourcesError: there is no such device, or its memory does not hold the images and the network.
        """
        self._dataset = dataset.to(require_device(device))
        stream = f"teacher/{index}"
        network = build_model(
            model,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            draw=generator(seed, f"{stream}/init"),
        )
        self._initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self._training = Training(
            network.to(device),
            self._dataset.train,
            self._dataset.train_labels,
            self._dataset,
            spec=training,
            seed=seed,
            stream=stream,
            compiled=compiled,
            seconds=seconds,
            may_fall_back=may_fall_back,
            field="teachers.training",
        )

    @property
    def compiled(self) -> bool:
        """Whether it goes through `torch.compile`."""
        return self._training.compiled

    @property
    def compile_error(self) -> str:
        """Why it is eager although it was to be compiled, in one line; empty where that is not so."""
        return self._training.compile_error

    @property
    def halvings(self) -> int:
        """How often a batch was cut in smaller pieces for want of memory; the bits are then no longer those of another run."""
        return self._training.halvings

    @property
    def total(self) -> int:
        """Steps in all."""
        return self._training.total

    @property
    def step(self) -> int:
        """Steps done."""
        return self._training.step

    def run(self, until: int | None = None, *, pause: Callable[[], bool] = never) -> Iterator[Progress]:
        """Train from `step` to `until` (all of it by default), or to the first step after which `pause` says so.

        Raises:
            OutOfMemoryError: a step does not fit the memory, even in smaller pieces.
        """
        yield from self._training.run(until, pause=pause)

    def state(self) -> Weights:
        """Everything needed to go on bit for bit; the initial weights are drawn again."""
        return self._training.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of another training.
        """
        self._training.load_state(state)

    def result(self) -> Weights:
        """`initial.<parameter>` and `trained.<parameter>`, on the CPU."""
        trained = self._training.model.state_dict()
        return {f"initial.{name}": tensor for name, tensor in self._initial.items()} | {
            f"trained.{name}": tensor.detach().cpu().clone() for name, tensor in trained.items()
        }

    def accuracy(self) -> float:
        """Test accuracy of the trained end, in percent.

        Raises:
            OutOfMemoryError: a batch of test images does not fit the memory, nor does half of it.
        """
        return accuracy(self._training.model, self._dataset)


@dataclass(frozen=True, slots=True)
class Extractors:
    """The networks of one draw, as weights for `TeacherPool.network`; none of them asks for gradients."""

    match: Weights
    """Blend of the initial and the trained end of one teacher."""
    calibrate: Weights
    """The trained end of the same teacher."""


class TeacherPool:
    """All teachers, stacked on the device, so that a blend is one `lerp` per parameter."""

    @told(_full)
    def __init__(
        self,
        model: ModelSpec,
        dataset: Dataset,
        teachers: Sequence[Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        """
        Args:
            model: the network of all of them.
            dataset: for image shape and classes.
            teachers: what `TeacherTraining.result` gave, at least one.
            device: where to keep them.

        Raises:
            SpecError: there are none, or images are too small for the network.
            ResourcesError: there is no such device, or its memory does not hold them.
        """
        if not teachers:
            raise SpecError.of(
                "teachers", 0, "a pool needs a teacher", "Give what TeacherTraining.result gave, at least once."
            )
        require_device(device)
        self.network: Network = build_model(
            model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, draw=generator(0, "unused")
        ).to(device)
        _freeze(self.network)
        # Apart, so that no call has to switch the mode of a network that may be compiled.
        self._evaluated = copy.deepcopy(self.network).eval() if model.batch_statistics else self.network
        self.count, self._image_shape, self._device = len(teachers), dataset.image_shape, device
        self.batch_statistics = model.batch_statistics
        parameters, buffers = (
            [name for name, _ in named] for named in (self.network.named_parameters(), self.network.named_buffers())
        )

        def stacked(end: str, names: Sequence[str]) -> Weights:
            ends = [part(teacher, f"{end}.") for teacher in teachers]
            return {name: torch.stack([each[name] for each in ends]).to(device) for name in names}

        self._initial = stacked("initial", parameters)
        self._trained = stacked("trained", parameters)
        self._buffers = stacked("trained", buffers)

    def draw(self, draw: torch.Generator) -> Extractors:
        """A teacher, uniform, and the blend (1 - beta) initial + beta trained with beta ~ U(0, 1) (NCFM, section 3.3).

        Blended are the parameters. Running statistics of batch norms are those of the trained end, for both.
        """
        index = int(torch.randint(self.count, (), generator=draw))
        beta = float(torch.rand((), generator=draw))
        buffers = {name: stack[index] for name, stack in self._buffers.items()}
        trained = {name: stack[index] for name, stack in self._trained.items()}
        match = {name: torch.lerp(stack[index], trained[name], beta) for name, stack in self._initial.items()}
        return Extractors(match=match | buffers, calibrate=trained | buffers)

    def trained(self, index: int) -> Weights:
        """The trained end of one teacher, running statistics included."""
        return {name: stack[index] for name, stack in (self._trained | self._buffers).items()}

    @torch.no_grad()
    def raw_features(self, weights: Weights, images: Tensor) -> Tensor:
        """Flat features of shape (N, num_features), of their own length, without gradients, in evaluation mode."""
        features: Tensor = torch.func.functional_call(self._evaluated, weights, (images,), {"features_only": True})
        return features

    def features(self, weights: Weights, images: Tensor) -> Tensor:
        """Flat features of shape (N, num_features), each of length 1 (as the authors' code has it).

        Batch norms take the statistics of these images, as they do while a network is trained (and as DM has it): all images
        that are to be compared with each other have to be among them.

        Args:
            weights: of one network of this pool.
            images: normalised, shape (N, channels, H, W); in bfloat16 if the weights are (`in_bfloat16`).
        """
        features: Tensor = torch.func.functional_call(self.network, weights, (images,), {"features_only": True})
        # The network computes in bfloat16 then; lengths are taken in float32.
        if images.dtype == torch.bfloat16:
            features = features.to(torch.float32)
        return torch.nn.functional.normalize(features, dim=1)

    def logits(self, weights: Weights, images: Tensor) -> Tensor:
        """Logits of shape (N, classes); batch norms take the running statistics that came with the weights."""
        logits: Tensor = torch.func.functional_call(self._evaluated, weights, (images,))
        return logits

    def forward_batch(self, most: int | None = None) -> int:
        """Images to put through a network of this pool at a time without gradients; at most so many."""
        image = torch.zeros((1, *self._image_shape), device=self._device)
        with told(_full):
            return forward_batch(self._evaluated, image, most)

    @torch.no_grad()
    def label(self, images: Tensor) -> Tensor:
        """Soft labels: the logarithm of the mean probability that the trained teachers give each class.

        Args:
            images: normalised and not augmented, shape (N, channels, H, W).

        Returns:
            Logits, float32 of shape (N, classes).

        Raises:
            OutOfMemoryError: a batch does not fit the memory, nor does half of it.
        """

        def labelled(size: int) -> Tensor:
            pieces = []
            for piece in images.split(size):
                each = [self.logits(self.trained(index), piece).log_softmax(1) for index in range(self.count)]
                pieces.append(torch.stack(each).logsumexp(0) - math.log(self.count))
            return torch.cat(pieces)

        def full(size: int) -> OutOfMemoryError:
            message = f"labelling {size} images at once does not fit the memory of {self._device}"
            return OutOfMemoryError.of(
                "model.width", None, message, "Lower it, or the image size; or take method.labels hard."
            )

        return in_halves(labelled, self.forward_batch(LABEL_BATCH), full=full, device=self._device)


def in_bfloat16(weights: Weights) -> Weights:
    """The weights of a network that takes images in bfloat16."""
    return {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    }


def _freeze(network: Network) -> None:
    """No gradients for the parameters, and no forward that moves running statistics: they belong to the teachers' files."""
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
