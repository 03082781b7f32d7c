"""What is measured: a resolved spec, its data, and the device."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue

from ncfm_core.bench.machine import choose_device, device_name
from ncfm_core.catalog import DatasetFacts, dataset_facts
from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.errors import DatasetError, Problem, SpecError
from ncfm_core.presets import overlay
from ncfm_core.protocols import Document
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve

RELEASED: Document = {
    "method": {
        "name": "ncfm",
        "steps": 20_000,
        "image_weight_decay": 5e-4,
        "schedule": "plateau",
        "init": "tiled",
        "factor": 2,
        "real_batch": 1024,
        "real_sampling": "prefix",
        "reuse": 1,
        "discrepancy": "characteristic",
        "sampler": "gaussian",
        "num_frequencies": 4096,
        "frequency_scale": 1.0,
        "amplitude_weight": 0.5,
        "discrepancy_weight": 300.0,
        "calibration_weight": 1.0,
        "augment": {"policy": "stack", "ops": ["color", "crop", "cutout"]},
        "labels": "hard",
        "precision": "float32",
    },
    "model": {"name": "convnet", "width": 128, "norm": "instance"},
    "teachers": {"count": 20},
}
"""The configuration of the released NCFM code (its yaml files are alike but for data set and IPC), as far as it decides the
work of an image step. Not in it: the rate, because one joint step here stands for 2C steps through a shared Adam there, and the
depth, which belongs to the data set."""
MADE_BYTES = 1 << 30
"""Most pixels of a made-up data set; only sets far above CIFAR's size are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    spec: JobSpec
    dataset: Dataset
    data: str
    """`real`, or `made` for random pixels of the same shape."""
    device: torch.device
    compiled: bool | None
    """None for the engine's own rule."""
    threads: int | None
    """As asked for; None if nothing was."""
    started: float
    """`time.monotonic` at the start of the command."""

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a step's activations may take."""
        limit = self.spec.resources.memory_limit
        return None if limit is None else limit << 20

    def describe(self) -> Document:
        """What every line of output says of the work."""
        spec = self.spec
        method, model = (part.model_dump(mode="json") for part in (spec.method, spec.model))
        return {
            "config": {
                "dataset": spec.dataset.name,
                "ipc": spec.ipc,
                "preset": spec.preset,
                "method": method,
                "model": model,
                "teachers": spec.teachers.count,
            },
            "equal_work": overlay(spec.document(), RELEASED) == spec.document(),
            "data": self.data,
            "device": self.device.type,
            "device_name": device_name(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "tf32": {
                "convolutions": self.device.type == "cuda" and bool(torch.backends.cudnn.allow_tf32),
                "products": self.device.type == "cuda" and bool(torch.backends.cuda.matmul.allow_tf32),
            },
        }


def prepare(
    *,
    dataset: str,
    ipc: int,
    preset: str | None = None,
    equal_work: bool = False,
    changes: Sequence[str] = (),
    teachers: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    compiled: bool | None = None,
    data: Path = Path("data"),
    made: bool = False,
) -> Work:
    """Settle what is measured.

    Args:
        dataset: name in the catalog.
        ipc: stored images per class.
        preset: where the rest comes from; None for the data set's own.
        equal_work: lay the released configuration over it.
        changes: `dotted.key=value` of the submission, laid over all that.
        teachers: networks in the pool; None for the preset's.
        device: `auto`, `cpu` or `cuda`.
        threads: of torch on the CPU; None leaves them as they are.
        memory_limit: MiB that a step's activations may take.
        compiled: whether networks go through `torch.compile`; None where it pays.
        data: folder of data sets.
        made: whether random pixels will do where the data are absent.

    Raises:
        SpecError: the submission is not legal.
        DatasetError: there are no data.
        ResourcesError: there is no such device.
    """
    started = time.monotonic()
    submission: Document = {"dataset": dataset, "ipc": ipc}
    if preset is not None:
        submission["preset"] = preset
    if equal_work:
        submission = overlay(submission, RELEASED)
    if memory_limit is not None:
        submission["resources"] = {"memory_limit": memory_limit}
    if teachers is not None:
        submission = overlay(submission, {"teachers": {"count": teachers}})
    spec = resolve(with_changes(submission, changes))
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded, kind = _load(spec, data, made=made)
    return Work(
        spec=spec, dataset=loaded, data=kind, device=chosen, compiled=compiled, threads=threads, started=started
    )


def with_changes(document: Document, changes: Sequence[str]) -> Document:
    """The submission with each `dotted.key=value` laid over it; values are JSON, or text where they are none.

    Raises:
        SpecError: a change is not of that form.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise SpecError.of("--set", change, "not of the form dotted.key=value", "Try --set method.steps=500.")
        *parents, last = names
        laid: Document = {last: _value(text)}
        for name in reversed(parents):
            laid = {name: laid}
        document = overlay(document, laid)
    return document


def _value(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except ValueError:
        return text
    return value


def _load(spec: JobSpec, folder: Path, *, made: bool) -> tuple[Dataset, str]:
    try:
        return load_dataset(spec.dataset, data_dir=folder, cache_dir=folder / "converted"), "real"
    except DatasetError as error:
        if made:
            return made_dataset(dataset_facts(spec.dataset.name)), "made"
        problem = error.problems[0]
        hint = "Name its folder with --data, or take random pixels of the same shape with --made (a step is as fast)."
        raise DatasetError(Problem(problem.field, problem.value, problem.message, hint)) from None


def made_dataset(facts: DatasetFacts) -> Dataset:
    """Random pixels in the shape of a data set, equally many of each class.

    Args:
        facts: the data set.
    """
    shape = (facts.channels, facts.image_size, facts.image_size)
    most = MADE_BYTES // (facts.num_classes * facts.channels * facts.image_size**2)
    draw = generator(0, "bench/made")

    def labelled(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        per_class = max(1, min(most, number // facts.num_classes))
        labels = torch.arange(facts.num_classes).repeat(per_class)
        return torch.randint(256, (len(labels), *shape), generator=draw, dtype=torch.uint8), labels

    train_images, train_labels = labelled(facts.num_train)
    test_images, test_labels = labelled(facts.num_test)
    return Dataset(
        name=facts.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=facts.class_names or tuple(str(label) for label in range(facts.num_classes)),
        mean=torch.tensor(facts.mean or (0.5,) * facts.channels),
        std=torch.tensor(facts.std or (0.25,) * facts.channels),
    )
