"""Where the compiler fails at a real shape: eager instead if nobody asked for it and no step is made, an error otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError

from ncfm_core import distill, execution, training
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.errors import ResourcesError
from ncfm_core.evaluate import evaluate
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.progress import finish
from ncfm_core.spec import JobSpec

CPU = torch.device("cpu")
FIRST_LINE = "CppCompileError: C++ compile error"
Forward = Callable[..., Tensor]


class Broken:
    """Stands for `compiled_form`: lets so many calls through, then the compiler fails."""

    def __init__(self, good: int = 0, error: Exception | None = None) -> None:
        self.good, self.failed = good, 0
        self.error = error or CppCompileError(["g++"], "no such header")

    def __call__(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.good -= 1
            if self.good < 0:
                self.failed += 1
                raise self.error
            return forward(*args, **kwargs)

        return run


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compile, by the engine's own rule."""
    for module in (execution, training):
        monkeypatch.setattr(module, "compiling_pays", lambda *_: True)


def distillation(digits: Dataset, pool: TeacherPool, spec: JobSpec, *, compiled: bool | None = None) -> Distillation:
    return Distillation(digits, pool, spec.method, ipc=1, seed=0, device=CPU, compiled=compiled)


def told(run: Distillation | TeacherTraining) -> tuple[bool, str]:
    """Whether it is compiled, and why not although it was to be."""
    compiled = run.execution.compiled if isinstance(run, Distillation) else run.compiled
    return compiled, run.compile_error


# One forward for the real images, one for psi, one to match, one to calibrate: the compiler may fail at each of them.
@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("good", [0, 1, 2, 3])
def test_distillation_whose_first_step_cannot_be_compiled_is_the_eager_one(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(good)
    monkeypatch.setattr(distill, "compiled_form", broken)
    run, eager = distillation(digits, pool, spec), distillation(digits, pool, spec, compiled=False)
    assert told(run) == (True, "")
    for each in (run, eager):
        each._carry_out(replace(each.execution, chunk=1000, block=10))
        list(each.run(until=7))
    assert broken.failed == 1
    compiled, why = told(run)
    assert not compiled and why.startswith(FIRST_LINE) and "\n" not in why
    for name, tensor in eager.state().items():
        assert torch.equal(tensor, run.state()[name]), name


@pytest.mark.usefixtures("pays")
def test_distillation_that_was_asked_to_compile_or_goes_on_compiled_tells_the_way_out(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "compiled_form", Broken(10**9))
    whole = distillation(digits, pool, spec)
    state = whole.state()
    list(whole.run(until=1))
    later = whole.state()
    monkeypatch.setattr(distill, "compiled_form", Broken())
    for run, begun in (
        (distillation(digits, pool, spec, compiled=True), None),
        (distillation(digits, pool, spec), state),
        (distillation(digits, pool, spec), later),
    ):
        if begun is not None:
            run.load_state(begun)
        with pytest.raises(ResourcesError, match=r"torch\.compile: failed \(CppCompileError.*leave the choice"):
            list(run.run(until=3))
        assert told(run) == (True, "")


@pytest.mark.usefixtures("pays")
def test_error_that_is_not_the_compilers_comes_again_from_the_eager_step(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ValueError("shapes do not fit")
    monkeypatch.setattr(distill, "compiled_form", Broken(error=wrong))
    asked = distillation(digits, pool, spec, compiled=True)
    with pytest.raises(ValueError, match="shapes do not fit"):
        list(asked.run(until=1))
    run = distillation(digits, pool, spec)
    monkeypatch.setattr(
        run, "_carry_out", lambda _: setattr(run, "_features_forward", Broken(error=wrong)(pool.features))
    )
    with pytest.raises(ValueError, match="shapes do not fit"):
        list(run.run(until=1))


def teacher(digits: Dataset, spec: JobSpec, compiled: bool | None = None) -> TeacherTraining:
    recipe = spec.teachers.training.model_copy(update={"epochs": 1})
    return TeacherTraining(digits, spec.model, recipe, seed=0, index=0, device=CPU, compiled=compiled)


@pytest.mark.usefixtures("pays")
def test_teacher_whose_first_step_cannot_be_compiled_is_the_eager_one(
    digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr(training, "compiled_form", broken)
    run, eager = teacher(digits, spec), teacher(digits, spec, compiled=False)
    assert told(run) == (True, "")
    for each in (run, eager):
        list(each.run())
    compiled, why = told(run)
    assert broken.failed == 1 and not compiled and why.startswith(FIRST_LINE)
    for name, tensor in eager.state().items():
        assert torch.equal(tensor, run.state()[name]), name


@pytest.mark.usefixtures("pays")
def test_teacher_that_was_asked_to_compile_or_goes_on_compiled_tells_the_way_out(
    digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "compiled_form", Broken(10**9))
    whole = teacher(digits, spec)
    list(whole.run(until=1))
    monkeypatch.setattr(training, "compiled_form", Broken())
    resumed = teacher(digits, spec)
    resumed.load_state(whole.state())
    for run in (teacher(digits, spec, compiled=True), resumed):
        with pytest.raises(ResourcesError, match=r"torch\.compile: failed"):
            list(run.run())


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("asked", [None, True])
def test_students_fall_back_once_for_all_and_only_if_nobody_asked(
    digits: Dataset, spec: JobSpec, asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr(training, "compiled_form", broken)
    recipe = spec.evaluate[0].training.model_copy(update={"epochs": 1})

    def judged(compiled: bool | None) -> Any:
        data = (digits.train_images[:50], digits.train_labels[:50], digits)
        steps = evaluate(
            *data,
            model=spec.model,
            training=recipe,
            students=2,
            tests=1,
            seed=0,
            device=CPU,
            at_once=1,
            compiled=compiled,
        )
        return finish(steps)

    if asked:
        with pytest.raises(ResourcesError, match=r"torch\.compile: failed"):
            judged(asked)
        return
    found, eager = judged(asked), judged(False)
    assert broken.failed == 1 and not found.compiled and found.compile_error.startswith(FIRST_LINE)
    assert (found.last, found.best) == (eager.last, eager.best) and not eager.compile_error
