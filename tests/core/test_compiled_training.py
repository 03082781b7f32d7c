"""Training through `torch.compile`: the same up to rounding, bit for bit where it goes on, and compiled once for all students.

All tests share one network and one size of a batch, so that the compiler runs once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ncfm_core import execution
from ncfm_core.batches import Batches
from ncfm_core.datasets import Dataset
from ncfm_core.evaluate import evaluate
from ncfm_core.execution import COMPILE_OPERATIONS, compiled_form
from ncfm_core.models import Network, build_model
from ncfm_core.progress import finish
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.submission import resolve
from ncfm_core.training import Training, to_compile

CPU = torch.device("cpu")
MODEL = ModelSpec(name="convnet", depth=1, width=8, norm="instance")
IMAGES, BATCH_SIZE = 100, 64
needs_compiler = pytest.mark.usefixtures("compiler")
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, which looks at its inputs


def recipe(**changes: Any) -> TrainingSpec:
    entry = resolve({"dataset": "digits", "ipc": 1, "evaluate": [{"protocol": "quick"}]}).evaluate[0]
    return entry.training.model_copy(update={"epochs": 3, "batch_size": BATCH_SIZE} | changes)


def network(digits: Dataset, *, student: int = 0, model: ModelSpec = MODEL) -> Network:
    return build_model(model, image_shape=digits.image_shape, num_classes=10, draw=generator(student, "init"))


def batches(digits: Dataset, **changes: Any) -> Batches:
    return Batches(digits.train_images[:IMAGES], digits.train_labels[:IMAGES], digits, spec=recipe(**changes))


def training(digits: Dataset, *, compiled: bool | None, student: int = 0) -> Training:
    return Training(
        network(digits, student=student),
        digits.train_images[:IMAGES],
        digits.train_labels[:IMAGES],
        digits,
        spec=recipe(),
        seed=0,
        stream=f"student/{student}",
        compiled=compiled,
    )


def trained(run: Training, until: int | None = None) -> list[float]:
    """Train; the losses."""
    return [
        report.metrics["loss"] for step in range(run.step, until or run.total) for report in run.run(until=step + 1)
    ]


def weights(run: Training) -> list[Tensor]:
    return [parameter.detach() for parameter in run.model.parameters()]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@quiet
@needs_compiler
def test_compiled_training_is_the_eager_one_up_to_rounding(digits: Dataset) -> None:
    torch.compiler.reset()
    eager, compiled = (training(digits, compiled=each) for each in (False, True))
    assert (eager.compiled, compiled.compiled) == (False, True)
    before = graphs()
    losses = [trained(run) for run in (eager, compiled)]
    assert graphs() == before + 1, "the rest of 36 stays eager"
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    # Logits, not weights: under instance norm a bias has no effect, its gradient is rounding, and AdamW makes steps of that.
    images = digits.normalise(digits.test_images[:50])
    torch.testing.assert_close(compiled.model(images), eager.model(images), atol=2e-3, rtol=2e-3)


@quiet
@needs_compiler
def test_compiled_training_that_was_stopped_goes_on_with_the_same_bits_in_another_process(digits: Dataset) -> None:
    whole, first, second = (training(digits, compiled=each) for each in (True, True, None))
    trained(whole)
    trained(first, until=3)
    torch.compiler.reset()
    second.load_state(first.state())
    assert second.compiled and second.step == 3
    before = graphs()
    trained(second)
    assert graphs() == before + 1
    assert all(torch.equal(left, right) for left, right in zip(weights(whole), weights(second), strict=True))


@quiet
@needs_compiler
def test_students_share_what_is_compiled(digits: Dataset) -> None:
    trained(training(digits, compiled=True))
    before = graphs()
    trained(training(digits, compiled=True, student=1))
    found = finish(
        evaluate(
            digits.train_images[:IMAGES],
            digits.train_labels[:IMAGES],
            digits,
            model=MODEL,
            training=recipe(),
            students=2,
            tests=2,
            seed=0,
            device=CPU,
            at_once=1,
            compiled=True,
        )
    )
    assert found.compiled and len(found.last) == 2
    assert graphs() == before


def test_students_trained_at_once_are_not_compiled(digits: Dataset) -> None:
    data = (digits.train_images[:10], digits.train_labels[:10], digits)
    judged = evaluate(
        *data, model=MODEL, training=recipe(), students=3, tests=1, seed=0, device=CPU, at_once=2, compiled=True
    )
    assert not finish(judged).compiled


def test_state_that_does_not_say_goes_on_eager_and_another_as_it_was(digits: Dataset) -> None:
    run = training(digits, compiled=False)
    trained(run, until=1)
    state = run.state()
    going = training(digits, compiled=True)
    going.load_state(state)
    assert not going.compiled
    older = training(digits, compiled=True)
    older.load_state({name: tensor for name, tensor in state.items() if name != "compiled"})
    assert not older.compiled
    trained(older)


@pytest.mark.parametrize("there", [True, False])
def test_compiling_is_for_long_trainings_and_several_students_count_together(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(execution, "compiler_works", lambda _: there)
    # Of 8 filters 3x3 at 64 places and a linear layer from 8x4x4 features; a backward pass is two forward ones.
    operations = 3 * IMAGES * (2 * 8 * 9 * 64 + 2 * 128 * 10)
    epochs = int(COMPILE_OPERATIONS["cpu"] // operations)
    assert not to_compile(network(digits), batches(digits, epochs=epochs))
    assert to_compile(network(digits), batches(digits, epochs=epochs + 1)) == there
    assert to_compile(network(digits), batches(digits, epochs=epochs // 2 + 1), trainings=2) == there
    assert not to_compile(network(digits), batches(digits, epochs=epochs + 1), seconds=60.0)


def test_networks_with_batch_statistics_stay_eager(digits: Dataset) -> None:
    model = network(digits, model=MODEL.model_copy(update={"norm": "batch"}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not to_compile(model, batches(digits, epochs=10**12))
    assert not to_compile(model, batches(digits), True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@needs_compiler
def test_compiler_that_is_broken_is_noticed_when_it_is_tried(tmp_path: Path) -> None:
    """As one without Python's headers fails: it is there, and ends with an error."""
    program = "from ncfm_core.execution import compiler_works; print(compiler_works('cpu'))"
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | broken, capture_output=True, text=True, check=True
    )
    assert told.stdout == "False\n"


def test_more_than_eight_forms_are_compiled_and_none_falls_back() -> None:
    double = compiled_form(lambda images: images * 2)
    before = graphs()
    with torch.compiler.set_stance("default", force_backend="eager"):
        for size in range(2, 14):
            assert double(torch.ones(size)).sum() == 2 * size
    assert graphs() == before + 12
