"""Whether a pipeline compiles its trainings: decided over all of them, the same however it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch._inductor.exc import CppCompileError

from ncfm_core import execution
from ncfm_core.batches import Batches
from ncfm_core.bench.compiling import Compiled, choose_compiled
from ncfm_core.bench.folder import Folder
from ncfm_core.bench.pipeline import Deadline, Pipeline
from ncfm_core.bench.work import Work, prepare
from ncfm_core.errors import ResourcesError
from ncfm_core.evaluate import _student
from ncfm_core.pools import TeacherTraining
from ncfm_core.training import operations_of

SMALL = (
    "model.width=8",
    "method.steps=2",
    "method.num_frequencies=16",
    "method.real_batch=16",
    "method.num_components=4",
)
RECIPES = ("teachers.training.epochs=1",)


@pytest.fixture(autouse=True)
def _a_compiler_that_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "compiler_works", lambda kind: True)


def digits(*, teachers: int = 4, students: int = 3, ipc: int = 20, compiled: bool | None = None, **entry: Any) -> Work:
    entries = [{"students": students, "training": {"epochs": 2}} | entry]
    changes = (*SMALL, *RECIPES, f"evaluate={json.dumps(entries)}")
    return prepare(dataset="digits", ipc=ipc, teachers=teachers, changes=changes, device="cpu", compiled=compiled)


def of_a_teacher(work: Work) -> float:
    spec, data = work.spec, work.dataset
    batches = Batches(data.train, data.train_labels, data, spec=spec.teachers.training)
    return operations_of(_student(0, spec.model, data, 0), batches)


def choice(work: Work, bound: float, monkeypatch: pytest.MonkeyPatch, *, num_seeds: int = 1) -> Compiled:
    monkeypatch.setitem(execution.COMPILE_OPERATIONS, "cpu", bound)
    return choose_compiled(work, work.dataset, num_seeds)


def test_teachers_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    work = digits()
    one = of_a_teacher(work)
    assert choice(work, 3.9 * one, monkeypatch).teachers
    spec = work.spec
    alone = TeacherTraining(work.dataset, spec.model, spec.teachers.training, seed=0, index=0, device=work.device)
    assert not alone.compiled, "a teacher that counts itself alone stays eager"
    assert not choice(work, 100 * one, monkeypatch).teachers


def test_students_of_the_teachers_form_count_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 images, so both go through the network in batches of 128."""
    work = digits()
    one = of_a_teacher(work)
    student = one * 2 * 200 / len(work.dataset.train_labels)
    for num_seeds in (1, 2):
        together = 4 * one + num_seeds * 3 * student
        assert choice(work, 0.999 * together, monkeypatch, num_seeds=num_seeds) == Compiled(True, (True,))
        assert choice(work, 1.001 * together, monkeypatch, num_seeds=num_seeds) == Compiled(False, (False,))


def test_another_form_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    work = digits(model={"name": "convnet", "width": 16})
    assert choice(work, 3.9 * of_a_teacher(work), monkeypatch) == Compiled(True, (False,))


def test_students_that_share_a_step_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(digits(ipc=1), 1, monkeypatch) == Compiled(True, (False,))


def test_what_was_asked_for_is_done_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_norm = {"name": "convnet", "width": 8, "norm": "batch"}
    assert choice(digits(compiled=True, model=batch_norm), 1e30, monkeypatch) == Compiled(True, (False,))
    assert choice(digits(compiled=False), 1, monkeypatch) == Compiled(False, (False,))


def test_choice_of_a_narrow_network_on_a_cpu_is_what_it_was() -> None:
    work = digits()
    assert choose_compiled(work, work.dataset, 1) == Compiled(False, (False,))


def test_only_the_first_compiled_teacher_of_a_call_needs_its_first_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = digits(teachers=3)
    asked: list[float | None] = []

    class Listening(Deadline):
        def allows(self, expected: float | None = 0.0) -> bool:
            asked.append(expected)
            return True

    monkeypatch.setitem(execution.COMPILE_OPERATIONS, "cpu", 1)
    monkeypatch.setattr("ncfm_core.training.compiled_form", lambda forward: forward)
    clock = Listening(None, started=0)
    pipeline = Pipeline(
        work, seeds=(0,), clock=clock, say=list[str]().append, folder=Folder(tmp_path), folder_bytes=64 << 20
    )
    pipeline._moved = True
    pipeline._teach()
    between = [expected for expected in asked if expected is None]
    assert len(between) == 1 and asked[0] is None
    assert pipeline.document()["compiled"] == {"teachers": True, "students": [True]}


class Broken:
    """Stands for `compiled_form`: the compiler is there, and fails at every real shape."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.failed += 1
            raise CppCompileError(["g++"], "no such header")

        return run


def test_pipeline_that_nobody_asked_to_compile_goes_on_eager_where_that_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(execution.COMPILE_OPERATIONS, "cpu", 1)
    broken, work = Broken(), digits(teachers=2, students=2)
    for module in ("training", "distill"):
        monkeypatch.setattr(f"ncfm_core.{module}.compiled_form", broken)

    def call(seconds: float | None) -> Pipeline:
        clock = Deadline(seconds, started=0.0)
        folder = Folder(tmp_path)
        return Pipeline(work, seeds=(0,), clock=clock, say=list[str]().append, folder=folder, folder_bytes=64 << 20)

    pipeline = call(1e-9)
    # It has time for a step alone, and the teacher that is under way is eager already.
    assert not pipeline.run()
    assert pipeline.document()["compiled"] == {"teachers": False, "students": [True]}
    pipeline = call(None)
    assert pipeline.run()
    assert broken.failed == 3, "once for all teachers, once for the set, once for all students"
    document = pipeline.document()
    assert document["compiled"] == {"teachers": False, "students": [False]}
    monkeypatch.undo()
    monkeypatch.setattr(execution, "compiler_works", lambda kind: False)
    eager = Pipeline(work, seeds=(0,), clock=Deadline(None, started=0.0), say=list[str]().append, group=1)
    assert eager.run()
    for name in ("teacher_accuracy", "evaluations"):
        assert document[name] == eager.document()[name]


def test_pipeline_that_was_asked_to_compile_tells_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncfm_core.training.compiled_form", Broken())
    work = digits(teachers=1, compiled=True)
    pipeline = Pipeline(work, seeds=(0,), clock=Deadline(None, started=0.0), say=list[str]().append)
    with pytest.raises(ResourcesError, match=r"torch\.compile: failed"):
        pipeline.run()
