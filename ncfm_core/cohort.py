"""Students of one network trained at once, as one network whose parameters have a leading axis of students.

Every student draws what it would draw alone, so the results are those of `training.Training` up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm_core.batches import Batch, Batches
from ncfm_core.devices import told, tried_again
from ncfm_core.errors import OutOfMemoryError
from ncfm_core.models.convnet import ConvNet
from ncfm_core.models.probing import largest_map, separable
from ncfm_core.training import make_optimizer, set_rate

LARGEST_MAP = {"cpu": 128 * 2**10, "cuda": 32 * 2**20}
"""Bytes of the largest feature map of one student's batch, up to which students share a step: where overhead outweighs the sums.

Measured on a CPU (docs/performance.md): at 80 KiB a step of five takes a half to a third of five steps, at 320 KiB as long, above
longer. On a GPU not yet measured.
"""
ALL_MAPS = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""The same of all students of a step together: bounds the memory."""

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def students_at_once(network: nn.Module, batches: Batches) -> int:
    """How many students to train in one step; 1 where each is trained apart.

    Args:
        network: one student.
        batches: what they are trained on.
    """
    kind = batches.device.type
    if kind not in LARGEST_MAP or not separable(network) or (kind == "cpu" and not _has_grouped_form(network)):
        return 1
    size = largest_map(network, batches.example()) * batches.batch_size
    return ALL_MAPS[kind] // size if size <= LARGEST_MAP[kind] else 1


class Cohort:
    """Several students in one step."""

    def __init__(
        self,
        students: Sequence[nn.Module],
        batches: Batches,
        *,
        seed: int,
        streams: Sequence[str],
        field: str = "training",
    ) -> None:
        """
        Args:
            students: fresh ones of one network, on the images' device.
            batches: what they are trained on.
            seed: of everything drawn.
            streams: name of each one's training.
            field: where the recipe stands in a submission, for errors.
        """
        self.total, self.step, self.halvings = batches.total, 0, 0
        self._chunk, self._field = batches.batch_size, field
        self._batches, self._seed, self._streams = batches, seed, tuple(streams)
        names = [name for name, _ in students[0].named_parameters()]
        stacks = [torch.stack([student.get_parameter(name).detach() for student in students]) for name in names]
        self._parameters = {name: stack.requires_grad_(True) for name, stack in zip(names, stacks, strict=True)}
        self._optimizer = make_optimizer(self._parameters.values(), batches.spec)
        self._forward = forward_of(students[0])
        self._network = copy.deepcopy(students[0])
        self._orders = torch.empty(0, dtype=torch.int64)

    def advance(self, until: int) -> None:
        """Train from `step` to `until`.

        A step that runs out of memory is tried once more with pieces of a batch that are half as large; `halvings` counts that.

        Raises:
            OutOfMemoryError: a step does not fit the memory, even so.
        """
        while self.step < until:
            self._advance()

    def _advance(self) -> None:
        epoch, place = divmod(self.step, self._batches.steps_per_epoch)
        if place == 0:
            self._orders = self._batches.orders(epoch, seed=self._seed, streams=self._streams)
        draws = [
            self._batches.draw(order, self.step, seed=self._seed, stream=stream)
            for order, stream in zip(self._orders, self._streams, strict=True)
        ]
        with told(self._full):
            batch = self._batches.stacked(draws)
        set_rate(self._optimizer, self._batches.spec, epoch, is_first=place == 0)
        device = self._batches.device
        tried_again(lambda: self._gradient(batch), halve=self._halve, full=self._full, device=device)
        with told(self._full):
            self._optimizer.step()
        self.step += 1

    def _gradient(self, batch: Batch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for piece in batch.split(self._chunk, axis=1):
            share = piece.images.shape[1] / batch.images.shape[1]
            # Each student's loss reaches its own slice of the parameters alone, so the gradient of the sum is that of each.
            loss = self._batches.loss(self._forward(self._parameters, piece.images), piece).sum() * share
            torch.autograd.backward(loss)

    def _halve(self) -> bool:
        """Smaller pieces from now on; False where there are none."""
        if self._chunk == 1:
            return False
        self._chunk, self.halvings = self._chunk // 2, self.halvings + 1
        return True

    def _full(self) -> OutOfMemoryError:
        return OutOfMemoryError.of(
            f"{self._field}.batch_size",
            self._batches.spec.batch_size,
            f"a step of {len(self._streams)} students on {self._batches.batch_size} images each does not fit the memory of "
            f"{self._batches.device}, even in pieces of {self._chunk}",
            "Lower it or model.width.",
        )

    @torch.no_grad()
    def student(self, index: int) -> nn.Module:
        """One of the students as it is now; the module is used again for the next one that is asked for."""
        for name, stack in self._parameters.items():
            self._network.get_parameter(name).copy_(stack[index])
        return self._network


def forward_of(network: nn.Module) -> Forward:
    """The forward pass of stacked students: parameters with a leading k, images of shape (k, n, ...), logits (k, n, classes)."""
    if _has_grouped_form(network):
        assert isinstance(network, ConvNet)
        return _grouped(network)
    skeleton = copy.deepcopy(network).to("meta")

    def one(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(skeleton, parameters, (images,))
        return logits

    stacked = torch.func.vmap(one)
    return lambda parameters, images: stacked(dict(parameters), images)


def _has_grouped_form(network: nn.Module) -> bool:
    return isinstance(network, ConvNet) and all(isinstance(norm, nn.GroupNorm | nn.Identity) for norm in network.norms)


def _grouped(network: ConvNet) -> Forward:
    """A ConvNet's students side by side in the channels: grouped convolutions, without the copies that `vmap` makes."""
    paddings = [conv.padding for conv in network.convs if isinstance(conv, nn.Conv2d)]
    groups = [norm.num_groups if isinstance(norm, nn.GroupNorm) else 0 for norm in network.norms]

    def forward(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        k, n = images.shape[:2]
        maps = images.transpose(0, 1).flatten(1, 2)
        for block, (padding, norm_groups) in enumerate(zip(paddings, groups, strict=True)):
            weight, bias = (parameters[f"convs.{block}.{name}"].flatten(0, 1) for name in ("weight", "bias"))
            maps = F.conv2d(maps, weight, bias, padding=padding, groups=k)
            if norm_groups:
                weight, bias = (parameters[f"norms.{block}.{name}"].flatten() for name in ("weight", "bias"))
                maps = F.group_norm(maps, k * norm_groups, weight, bias)
            maps = F.avg_pool2d(F.relu(maps), 2)
        features = maps.view(n, k, -1).transpose(0, 1)
        weight, bias = parameters["classifier.weight"], parameters["classifier.bias"]
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))

    return forward
