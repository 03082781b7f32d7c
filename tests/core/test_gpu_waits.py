"""What the loops ask of a GPU, on a made-up one: how often it would be waited for, and what is copied to it.

Its tensors are fake (shapes and no numbers), those of the CPU are real. Three things need a driver and are stood in for: the
backward pass (gradients are made up), page-locked memory (which is noted), and a generator on the device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncfm_core import augment, distill
from ncfm_core.augment import OPERATIONS
from ncfm_core.batches import Batches
from ncfm_core.cohort import Cohort
from ncfm_core.coresets import herding, k_center
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.execution import Execution
from ncfm_core.models import build_model
from ncfm_core.pools import TeacherPool
from ncfm_core.rng import generator, moved_together
from ncfm_core.spec import AugmentSpec, JobSpec
from ncfm_core.submission import resolve
from ncfm_core.training import make_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten


@dataclass
class Asked:
    """What was asked of the made-up GPU; each entry says by which line."""

    waits: list[str] = field(default_factory=list)
    """For a number of its, or for a copy out of memory that is not page-locked."""
    copies: list[str] = field(default_factory=list)
    """To it, of any kind."""

    def clear(self) -> None:
        self.waits.clear()
        self.copies.clear()


class MadeUpGpu(TorchDispatchMode):
    """Computes what lies on the CPU, passes the rest to the mode of fake tensors below it, and takes notes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked = Asked()
        self._locked: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        target = torch.device(given.get("device") or "cpu").type
        if func is aten._pin_memory.default:
            self._locked.append(args[0].clone())
            return self._locked[-1]
        if len(here) == len(tensors) and target == "cpu":
            with unset_fake_temporarily():
                return func(*args, **given)
        if func is aten._local_scalar_dense.default:
            self._note(self.asked.waits, "reads a number")
            return 0
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, args, given, target)
        elif any(tensor.ndim for tensor in here):
            self._note(self.asked.copies, f"{func} with a tensor on the CPU")
            self._note(self.asked.waits, f"{func} with a tensor on the CPU")
        if given.get("generator") is not None:
            del given["generator"]
            return torch.empty(args[0], dtype=given.get("dtype"), device=CUDA)
        return func(*args, **given)

    def _note_copy(self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any], target: str) -> None:
        into_place = func is aten.copy_.default
        source, target = (args[1], args[0].device.type) if into_place else (args[0], target)
        if source.is_cuda and target == "cpu" and (into_place or "device" in given):
            self._note(self.asked.waits, "copies to the CPU")
        if source.device.type == "cpu" and target == "cuda" and source.ndim:
            self._note(self.asked.copies, "copies to the GPU")
            queued = args[2] if into_place and len(args) > 2 else given.get("non_blocking")
            if not (queued and any(source is locked for locked in self._locked)):
                self._note(self.asked.waits, "copies out of memory that is not page-locked")

    @staticmethod
    def _note(notes: list[str], what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/ncfm_core/" in frame.filename]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the test"
        notes.append(f"{line} {what}")


@contextmanager
def made_up_gpu() -> Iterator[Asked]:
    with FakeTensorMode(allow_non_fake_inputs=True), MadeUpGpu() as gpu:
        yield gpu.asked


@cache
def works() -> str:
    """Why there can be no made-up GPU with this PyTorch; empty where there can."""
    try:
        with made_up_gpu() as asked:
            there = moved_together([torch.rand(3), torch.arange(2)], CUDA)
            assert all(each.is_cuda for each in there) and len(asked.copies) == 1 and not asked.waits
            int(there[1].sum())
            assert len(asked.waits) == 1
            assert int(torch.arange(3).sum()) == 3
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason.
        return f"no fake CUDA tensors with torch {torch.__version__}: {type(error).__name__}: {error}"
    return ""


@pytest.fixture(autouse=True)
def possible() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: fake tensors would mix with its own")
    if reason := works():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(_outputs: Tensor, inputs: Tensor | Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs))

    monkeypatch.setattr(torch.autograd, "grad", gradients)


def stand_in(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def on_gpu(dataset: Dataset) -> Dataset:
    # Counted and sorted once for each data set, here before it moves; the labels of fake tensors cannot be.
    assert dataset.class_counts and len(dataset.members)
    return dataset.to(CUDA)


def distillation(pool: TeacherPool, dataset: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> Distillation:
    """On the made-up GPU, whose mode must be on; what is not of a step is made on the CPU, or stood in for."""
    for name in ("_initial", "_trained", "_buffers"):
        stacks = {parameter: stand_in(stack) for parameter, stack in getattr(pool, name).items()}
        monkeypatch.setattr(pool, name, stacks)
    execution = Execution(chunk=64, block=5, recompute=False, compiled=False)
    monkeypatch.setattr(distill, "require_device", lambda device: device)
    monkeypatch.setattr(distill, "choose", lambda *_, **__: execution)
    # One on a GPU needs a driver.
    monkeypatch.setattr(distill, "generator", lambda seed, stream, step=0, device=None: generator(seed, stream, step))
    return Distillation(dataset, pool, spec.method, ipc=2, seed=0, device=CUDA)


def small(**change: Any) -> JobSpec:
    method: dict[str, Any] = {"steps": 20, "reuse": 2, "factor": 2, "real_batch": 16}
    method |= {"num_frequencies": 64, "num_components": 8, **change}
    return resolve({"dataset": "digits", "ipc": 2, "model": {"width": 8}, "method": method})


def fresh_pool(spec: JobSpec, digits: Dataset) -> TeacherPool:
    ends = build_model(spec.model, image_shape=digits.image_shape, num_classes=10, draw=generator(0, "t")).state_dict()
    teacher = {f"{end}.{name}": tensor for end in ("initial", "trained") for name, tensor in ends.items()}
    return TeacherPool(spec.model, digits, [teacher, teacher], CPU)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"augment": {"policy": "single", "ops": ["crop"]}},
        {"augment": {"policy": "single", "ops": ["flip"]}},
        {"augment": {"policy": "stack", "ops": ["flip", "color", "rotate", "cutout"]}, "discrepancy": "mean"},
        {"sampler": "gaussian", "real_sampling": "prefix", "precision": "bfloat16"},
        {"schedule": "plateau"},
    ],
)
def test_no_draw_and_no_step_of_a_distillation_waits(
    digits: Dataset, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small(**change)
    pool = fresh_pool(spec, digits)
    with made_up_gpu() as asked:
        run = distillation(pool, on_gpu(digits), spec, monkeypatch)
        for copies in (2, 0):
            asked.clear()
            if copies:
                run._open_draw()
                assert len(asked.copies) <= copies, "the indices of the real batch, and the augmentation"
            run._advance()
            assert len(asked.copies) <= copies + 1, "the augmentation of the calibration"
            assert not asked.waits


def test_a_run_waits_only_to_report(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small()
    pool = fresh_pool(spec, digits)
    with made_up_gpu() as asked:
        run = distillation(pool, on_gpu(digits), spec, monkeypatch)
        asked.clear()
        assert len(list(run.run(until=6))) == 1
        assert len(asked.waits) == 3 and len(set(asked.waits)) == 1, "three sums, read by one line"
        assert len(asked.copies) <= 3 * 2 + 6, "two a draw, one a step"


@pytest.mark.parametrize("num", [1, 6])
@pytest.mark.parametrize("name", OPERATIONS)
def test_augmentations_that_are_moved_first_copy_once_and_never_wait(name: str, num: int) -> None:
    spec = AugmentSpec.model_validate({"policy": "single", "ops": (name,)})
    with made_up_gpu() as asked:
        images = torch.empty((6, 3, 16, 16), device=CUDA)
        augmentation = augment.draw(spec, generator(0, "draw"), num).to(CUDA)
        for _ in range(3):
            assert augmentation(images).shape == images.shape
        assert len(asked.copies) <= 1 and not asked.waits


def batches(digits: Dataset, images: int = 40) -> Batches:
    entry = resolve({"dataset": "digits", "ipc": 1, "evaluate": [{"protocol": "ncfm"}]}).evaluate[0]
    ops = ("flip", "color", "crop", "scale", "rotate", "cutout")
    augmentation = AugmentSpec.model_validate({"policy": "stack", "ops": ops})
    recipe = entry.training.model_copy(update={"batch_size": 16, "cutmix": 1.0, "augment": augmentation})
    return Batches(digits.train[:images], digits.train_labels[:images], digits, spec=recipe)


@pytest.mark.parametrize("images", [16, 40])
def test_a_step_of_a_training_copies_once_and_never_waits(digits: Dataset, images: int) -> None:
    with made_up_gpu() as asked:
        made = batches(on_gpu(digits), images)
        order = made.orders(0, seed=0, streams=("student/0",))[0]
        for step in range(made.steps_per_epoch):
            asked.clear()
            batch = made.batch(made.draw(order, step, seed=0, stream="student/0"))
            assert batch.images.is_cuda and batch.labels.is_cuda and batch.others is not None
            logits = torch.empty((len(batch.images), 10), device=CUDA)
            assert made.loss(logits, batch).is_cuda
            assert len(asked.copies) == 1 and not asked.waits


def test_a_step_of_several_students_copies_once_and_never_waits(
    digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = [
        build_model(spec.model, image_shape=digits.image_shape, num_classes=10, draw=generator(0, f"s{index}"))
        for index in range(4)
    ]
    monkeypatch.setattr(torch.autograd, "backward", lambda _: None)
    with made_up_gpu() as asked:
        made = batches(on_gpu(digits))
        cohort = Cohort(students, made, seed=0, streams=[f"student/{index}" for index in range(4)])
        cohort._parameters = {name: stand_in(stack).requires_grad_() for name, stack in cohort._parameters.items()}
        cohort._optimizer = make_optimizer(cohort._parameters.values(), made.spec)
        for step in range(1, 4):
            for parameter in cohort._parameters.values():
                parameter.grad = torch.empty_like(parameter)
            asked.clear()
            cohort.advance(step)
            assert len(asked.copies) == 1 and not asked.waits


def test_choosing_real_images_by_their_features_never_waits() -> None:
    with made_up_gpu() as asked:
        features = torch.empty((20, 8), device=CUDA)
        assert herding(features, 5).shape == k_center(features, 5).shape == (5,)
        assert not asked.waits and not asked.copies


def test_waits_and_copies_are_noticed() -> None:
    """The counting itself: what the tests above rest on."""
    with made_up_gpu() as asked:
        there = torch.empty(4, device=CUDA)
        there[torch.arange(2)]
        assert len(asked.waits) == len(asked.copies) == 1
        torch.rand(4).to(CUDA)
        assert len(asked.waits) == len(asked.copies) == 2
        torch.rand(4).pin_memory().to(CUDA, non_blocking=True)
        assert (len(asked.waits), len(asked.copies)) == (2, 3)
        float(there.sum())
        there.cpu()
        assert (len(asked.waits), len(asked.copies)) == (4, 3)


def test_tensors_moved_together_are_those_moved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, on real numbers: the target stays the CPU, only the kind of device is made up."""
    drawn = [
        torch.rand(3, 2),
        torch.arange(5),
        torch.rand(1, 1),
        torch.tensor([True]),
        torch.rand(4, dtype=torch.float64),
    ]
    monkeypatch.setattr("ncfm_core.rng.moved", lambda packed, _: packed)
    together = moved_together(drawn, CUDA)
    for ours, theirs in zip(together, drawn, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
