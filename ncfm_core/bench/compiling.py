"""Which trainings of a pipeline go through `torch.compile`: one compilation serves all that a process trains in its form."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from ncfm_core.batches import Batches
from ncfm_core.bench.work import Work
from ncfm_core.cohort import students_at_once
from ncfm_core.datasets import Dataset
from ncfm_core.execution import compiling_pays
from ncfm_core.models import build_model
from ncfm_core.models.probing import separable
from ncfm_core.protocols import Document
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.training import images_at_a_time, operations_of


@dataclass(frozen=True, slots=True)
class Compiled:
    teachers: bool
    students: tuple[bool, ...]
    """Of each entry of `evaluate`."""

    def without(self, name: str) -> Compiled:
        """The same, but for the teachers (`teachers`) or one entry of `evaluate` (its index), which are eager."""
        if name == "teachers":
            return replace(self, teachers=False)
        students = (each and str(number) != name for number, each in enumerate(self.students))
        return replace(self, students=tuple(students))

    def as_dict(self) -> Document:
        return {"teachers": self.teachers, "students": list(self.students)}


@dataclass(frozen=True, slots=True)
class _Form:
    """What a compilation is made for."""

    model: ModelSpec
    images: int
    """That go through the network at a time."""


def choose_compiled(work: Work, dataset: Dataset, num_seeds: int) -> Compiled:
    """Decide by the operations of all trainings of a form together, where a training alone would count its own.

    All of a run count, in whatever call they are done: a run that is cut takes the same choices as one that is not.

    Args:
        work: what is measured.
        dataset: its data, on the device.
        num_seeds: synthetic sets, each judged by all students.
    """
    spec = work.spec
    operations: defaultdict[_Form, float] = defaultdict(float)

    def counted(
        model: ModelSpec, training: TrainingSpec, images: int, trainings: int, *, students: bool
    ) -> _Form | None:
        """The form of so many trainings, whose operations are added to it; None for those that stay eager anyway."""
        shape, classes = dataset.image_shape, dataset.num_classes
        network = build_model(model, image_shape=shape, num_classes=classes, draw=generator(0, "unused"))
        network, batches = network.to(work.device), _batches(dataset, training, images)
        if not separable(network) or (students and students_at_once(network, batches) > 1):
            return None
        form = _Form(model, images_at_a_time(network, batches))
        operations[form] += operations_of(network, batches) * trainings
        return form

    real, decoded = len(dataset.train_labels), dataset.num_classes * spec.ipc * spec.method.factor**2
    teachers = counted(spec.model, spec.teachers.training, real, spec.teachers.count, students=False)
    students = [
        counted(entry.model, entry.training, decoded, entry.students * num_seeds, students=True)
        for entry in spec.evaluate
    ]

    def pays(form: _Form | None) -> bool:
        if form is None:
            return False
        return compiling_pays(operations[form], work.device) if work.compiled is None else work.compiled

    return Compiled(pays(teachers), tuple(pays(form) for form in students))


def _batches(dataset: Dataset, training: TrainingSpec, images: int) -> Batches:
    """What a training on so many images would see, without their memory."""
    device, classes = dataset.device, dataset.num_classes
    return Batches(
        torch.zeros((1, *dataset.image_shape), dtype=torch.uint8, device=device).expand(images, -1, -1, -1),
        torch.zeros(1, dtype=torch.int64, device=device).expand(images),
        dataset,
        spec=training,
        targets=torch.zeros((1, classes), device=device).expand(images, classes),
    )
