"""Where matching networks come from: a pool of teachers, blended between their initial and their trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.models import ConvNet, build_model
from ncfm_core.progress import Progress
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.training import Training, accuracy, part

Weights = dict[str, Tensor]


class TeacherTraining:
    """One teacher of a pool; which one depends on (seed, index) alone, so pools of 10 and 20 share ten."""

    def __init__(
        self,
        dataset: Dataset,
        model: ModelSpec,
        training: TrainingSpec,
        *,
        seed: int,
        index: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            dataset: the real data.
            model: the teacher's network.
            training: its recipe.
            seed: of the pool.
            index: of this teacher in the pool, from 0.
            device: where to train.
        """
        self._dataset = dataset.to(device)
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
            self._dataset.train_images,
            self._dataset.train_labels,
            self._dataset,
            spec=training,
            seed=seed,
            stream=stream,
        )

    @property
    def total(self) -> int:
        return self._training.total

    @property
    def step(self) -> int:
        return self._training.step

    def run(self, until: int | None = None) -> Iterator[Progress]:
        """Train from `step` to `until` (all of it by default)."""
        yield from self._training.run(until)

    def state(self) -> Weights:
        """Everything needed to go on bit for bit; the initial weights are drawn again."""
        return self._training.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._training.load_state(state)

    def result(self) -> Weights:
        """`initial.<parameter>` and `trained.<parameter>`, on the CPU."""
        trained = self._training.model.state_dict()
        return {f"initial.{name}": tensor for name, tensor in self._initial.items()} | {
            f"trained.{name}": tensor.detach().cpu().clone() for name, tensor in trained.items()
        }

    def accuracy(self) -> float:
        """Test accuracy of the trained end, in percent."""
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
        """
        self.network: ConvNet = build_model(
            model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, draw=generator(0, "unused")
        ).to(device)
        self.network.requires_grad_(False)
        self.count = len(teachers)
        self._initial, self._trained = (
            {
                name: torch.stack([part(teacher, f"{end}.")[name] for teacher in teachers]).to(device)
                for name in self.network.state_dict()
            }
            for end in ("initial", "trained")
        )

    def draw(self, draw: torch.Generator) -> Extractors:
        """A teacher, uniform, and the blend (1 - beta) initial + beta trained with beta ~ U(0, 1) (NCFM, section 3.3)."""
        index = int(torch.randint(self.count, (), generator=draw))
        beta = float(torch.rand((), generator=draw))
        trained = {name: stack[index] for name, stack in self._trained.items()}
        match = {name: torch.lerp(stack[index], trained[name], beta) for name, stack in self._initial.items()}
        return Extractors(match=match, calibrate=trained)

    def trained(self, index: int) -> Weights:
        """The trained end of one teacher."""
        return {name: stack[index] for name, stack in self._trained.items()}

    @torch.no_grad()
    def raw_features(self, weights: Weights, images: Tensor) -> Tensor:
        """Flat features of shape (N, num_features), of their own length, without gradients."""
        features: Tensor = torch.func.functional_call(self.network, weights, (images,), {"features_only": True})
        return features

    def features(self, weights: Weights, images: Tensor) -> Tensor:
        """Flat features of shape (N, num_features), each of length 1 (as the authors' code has it).

        Args:
            weights: of one network of this pool.
            images: normalised, shape (N, channels, H, W).
        """
        features: Tensor = torch.func.functional_call(self.network, weights, (images,), {"features_only": True})
        return torch.nn.functional.normalize(features, dim=1)

    def logits(self, weights: Weights, images: Tensor) -> Tensor:
        """Logits of shape (N, classes)."""
        logits: Tensor = torch.func.functional_call(self.network, weights, (images,))
        return logits
