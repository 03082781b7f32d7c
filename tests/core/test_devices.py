"""A full memory, wherever it is met: half as much at once, and then an error that names the knob."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncfm_core.batches import Batches
from ncfm_core.cohort import Cohort
from ncfm_core.coresets import coreset
from ncfm_core.datasets import Dataset
from ncfm_core.devices import in_halves, is_out_of_memory, require_device, told, tried_again
from ncfm_core.distill import Distillation
from ncfm_core.errors import NcfmError, ResourcesError
from ncfm_core.evaluate import evaluate
from ncfm_core.models import build_model
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.progress import finish
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec, ModelSpec
from ncfm_core.training import CUDA_FORWARD_BYTES, Training, accuracy, forward_batch

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB.")


def wrapped(*, suppressed: bool = False) -> Exception:
    try:
        try:
            raise FULL
        except RuntimeError as error:
            if suppressed:
                raise ValueError("another matter") from None
            raise RuntimeError("the graph could not be run") from error
    except (RuntimeError, ValueError) as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (wrapped(), True),
        (wrapped(suppressed=True), False),
        (RuntimeError("shapes do not fit"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (ResourcesError.of("model.width", None, "a step does not fit: out of memory"), False),
    ],
    ids=str,
)
def test_full_memory_is_recognised_by_class_words_and_cause(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) == full


def test_allocator_of_the_cpu_is_recognised_as_it_speaks() -> None:
    with pytest.raises(ResourcesError, match="too much"), told(lambda: ResourcesError.of("", None, "too much")):
        torch.empty(1 << 60)


def test_errors_that_refer_to_each_other_end_the_search() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__context__, other.__context__ = other, one
    assert not is_out_of_memory(one)


def test_second_try_is_the_last_and_what_cannot_be_cut_has_none() -> None:
    tries: list[int] = []

    def compute(size: int) -> int:
        tries.append(size)
        if size > 3:
            raise FULL
        return size

    def full(size: int) -> ResourcesError:
        return ResourcesError.of("knob", size, "does not fit")

    assert in_halves(compute, 6, full=full, device=CPU) == 3
    with pytest.raises(ResourcesError, match=r"knob: does not fit \(got 5\)"):
        in_halves(compute, 10, full=full, device=CPU)
    assert tries == [6, 3, 10, 5]
    with pytest.raises(ResourcesError, match="got 9"):
        tried_again(lambda: compute(9), halve=lambda: False, full=lambda: full(9), device=CPU)
    assert tries[4:] == [9]


class Scarce(nn.Module):
    """A network that fails like a full memory whenever more than `most` images go through it at once."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise FULL
        logits: Tensor = self.network(images)
        return logits


def network(dataset: Dataset, spec: JobSpec, **changes: Any) -> nn.Module:
    model = spec.model.model_copy(update=changes)
    return build_model(model, image_shape=dataset.image_shape, num_classes=10, draw=generator(0, "init"))


def training(dataset: Dataset, spec: JobSpec, model: nn.Module) -> Training:
    images, labels = dataset.train_images[:300], dataset.train_labels[:300]
    recipe = spec.teachers.training
    return Training(model, images, labels, dataset, spec=recipe, seed=0, stream="test", compiled=False)


def test_training_step_is_tried_once_more_in_smaller_pieces(digits: Dataset, spec: JobSpec) -> None:
    whole, cut = (training(digits, spec, Scarce(network(digits, spec), 10_000)) for _ in range(2))
    size = whole.batch_size
    cut.model.most = size - 1  # type: ignore[assignment]
    for run in (whole, cut):
        list(run.run(until=5))
    assert (whole.halvings, cut.halvings, cut._chunk) == (0, 1, size // 2)
    for left, right in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
    resumed = training(digits, spec, Scarce(network(digits, spec), 10_000))
    resumed.load_state(cut.state())
    assert (resumed.halvings, resumed._chunk) == (1, size // 2)
    list(resumed.run(until=7))
    list(cut.run(until=7))
    for left, right in zip(resumed.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_training_step_that_does_not_fit_names_the_batch_size(digits: Dataset, spec: JobSpec) -> None:
    model = Scarce(network(digits, spec), 10_000)
    run = training(digits, spec, model)
    model.most = 0
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ResourcesError, match=rf"training\.batch_size: .* even in pieces of {run.batch_size // 2} "):
        list(run.run(until=1))
    assert run.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_network_that_never_fits_is_told_at_the_start(digits: Dataset, spec: JobSpec) -> None:
    with pytest.raises(ResourcesError, match=r"model\.width"):
        training(digits, spec, Scarce(network(digits, spec), 0))


def test_batch_norm_is_not_tried_again(digits: Dataset, spec: JobSpec) -> None:
    model = Scarce(network(digits, spec, norm="batch"), 0)
    run = training(digits, spec, model)
    model.seen.clear()
    with pytest.raises(ResourcesError, match="with batch norm it cannot be cut"):
        list(run.run(until=1))
    assert len(model.seen) == 1


def test_moments_that_do_not_fit_name_the_knob(digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(digits, spec, network(digits, spec))

    def step() -> None:
        raise FULL

    monkeypatch.setattr(run.optimizer, "step", step)
    with pytest.raises(ResourcesError, match=r"training\.batch_size"):
        list(run.run(until=1))


def test_students_that_share_a_step_are_cut_too(digits: Dataset, spec: JobSpec) -> None:
    streams = ("student/0", "student/1")
    images, labels = digits.train_images[:40], digits.train_labels[:40]
    recipe = spec.evaluate[0].training.model_copy(update={"batch_size": 16, "cutmix": 0.5, "epochs": 2})
    seen: list[int] = []

    def cohort(most: int) -> Cohort:
        batches = Batches(images, labels, digits, spec=recipe)
        made = Cohort([network(digits, spec) for _ in streams], batches, seed=0, streams=streams)
        forward = made._forward

        def scarce(parameters: Any, pixels: Tensor) -> Tensor:
            seen.append(pixels.shape[1])
            if pixels.shape[1] > most:
                raise FULL
            return forward(parameters, pixels)

        made._forward = scarce
        return made

    whole, cut = cohort(16), cohort(15)
    whole.advance(whole.total)
    assert set(seen) == {16, 8}
    seen.clear()
    cut.advance(cut.total)
    assert seen[0] == 16 and set(seen[1:]) == {8}
    assert (whole.halvings, cut.halvings) == (0, 1)
    pixels = digits.normalise(digits.test_images[:50])
    for index in range(2):
        torch.testing.assert_close(cut.student(index)(pixels), whole.student(index)(pixels), atol=2e-3, rtol=2e-3)
    with pytest.raises(ResourcesError, match=r"training\.batch_size: a step of 2 students on 16 images each"):
        cohort(0).advance(1)


def test_test_pass_is_tried_once_more_with_smaller_batches(digits: Dataset, spec: JobSpec) -> None:
    inner = network(digits, spec)
    expected = accuracy(inner, digits)
    model = Scarce(inner, 60)
    assert accuracy(model, digits) == expected
    assert model.seen == [100] + [50] * 10
    assert model.training
    with pytest.raises(ResourcesError, match=r"model\.width: 50 test images at once"):
        accuracy(Scarce(inner, 10), digits)


def scarce_pool(pool: TeacherPool, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    call = torch.func.functional_call

    def scarce(module: nn.Module, weights: Any, arguments: tuple[Tensor], *rest: Any) -> Any:
        seen.append(len(arguments[0]))
        if len(arguments[0]) > most:
            raise FULL
        return call(module, weights, arguments, *rest)

    monkeypatch.setattr(torch.func, "functional_call", scarce)
    return seen


def test_labels_and_coresets_are_tried_once_more(
    digits: Dataset, pool: TeacherPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = digits.normalise(digits.test_images)
    labels, (chosen, _) = pool.label(images), coreset("herding", digits, pool, ipc=3, device=CPU)
    seen = scarce_pool(pool, 200, monkeypatch)
    torch.testing.assert_close(pool.label(images), labels, atol=1e-5, rtol=1e-5)
    assert seen[0] == 256 and max(seen[1:]) == 128
    monkeypatch.undo()
    seen = scarce_pool(pool, 60, monkeypatch)
    assert torch.equal(coreset("herding", digits, pool, ipc=3, device=CPU)[0], chosen)
    assert seen[0] == 100 and max(seen[1:]) == 50
    monkeypatch.undo()
    scarce_pool(pool, 1, monkeypatch)
    with pytest.raises(ResourcesError, match=r"model\.width: labelling 128 images"):
        pool.label(images)
    with pytest.raises(ResourcesError, match=r"model\.width: the features of 50 images"):
        coreset("k_center", digits, pool, ipc=3, device=CPU)


def test_beginnings_that_do_not_fit_are_told(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(*_: Any) -> Dataset:
        raise FULL

    entry = spec.evaluate[0]
    options: dict[str, Any] = {"model": entry.model, "training": entry.training, "students": 1, "tests": 1, "seed": 0}
    begins: list[tuple[str, Callable[[], object]]] = [
        ("ipc: .*teachers.count", lambda: Distillation(digits, pool, spec.method, ipc=1, seed=0, device=CPU)),
        (
            r"model\.width: .*NCFM_DATA_MEMORY_GIB",
            lambda: TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=0, device=CPU),
        ),
        (
            r"model\.width: the images and a network",
            lambda: finish(evaluate(digits.train, digits.train_labels, digits, device=CPU, **options)),
        ),
    ]
    monkeypatch.setattr(Dataset, "to", move)
    for says, begin in begins:
        with pytest.raises(ResourcesError, match=says):
            begin()


@pytest.mark.parametrize(("size", "width", "most"), [(32, 128, 1000), (224, 128, 20), (224, 1024, 2), (8, 16, 1000)])
def test_forward_on_a_gpu_is_bounded_by_its_largest_map(size: int, width: int, most: int) -> None:
    spec = ModelSpec(name="convnet", depth=2, width=width, norm="instance")
    model = build_model(spec, image_shape=(3, size, size), num_classes=10, draw=generator(0, "init")).eval()
    image = torch.zeros(1, 3, size, size)
    assert forward_batch(model, image) == 100
    assert forward_batch(model, image, 256) == 256
    # Sizes alone are asked for: the meta device stands for a GPU here.
    found = forward_batch(model.to("meta"), image.to("meta"))
    assert found == most
    assert found * width * size**2 * 4 <= CUDA_FORWARD_BYTES
    assert forward_batch(model, image.to("meta"), 256) == min(256, most)


def test_device_that_is_not_there_is_told(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    away = torch.device("cuda", torch.cuda.device_count())
    entry = spec.evaluate[0]
    options: dict[str, Any] = {"model": entry.model, "training": entry.training, "students": 1, "tests": 1, "seed": 0}
    weights = [{"initial.x": torch.zeros(1), "trained.x": torch.zeros(1)}]
    for use in (
        lambda: require_device(away),
        lambda: Distillation(digits, pool, spec.method, ipc=1, seed=0, device=away),
        lambda: TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=0, device=away),
        lambda: TeacherPool(spec.model, digits, weights, away),
        lambda: coreset("herding", digits, pool, ipc=1, device=away),
        lambda: finish(evaluate(digits.train, digits.train_labels, digits, device=away, **options)),
    ):
        with pytest.raises(NcfmError, match=r"device: .*CUDA.*got 'cuda.*Choose cpu") as caught:
            use()
        assert isinstance(caught.value, ResourcesError)
    with pytest.raises(ResourcesError, match="neither the CPU nor a CUDA device"):
        require_device(torch.device("meta"))
    assert require_device(CPU) == CPU
