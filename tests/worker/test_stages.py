"""The stages on real data, without Ray: what they commit, and that a stopped one ends as if it had never been stopped."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ncfm_core import distill, execution, training
from ncfm_core.datasets import Dataset
from ncfm_core.errors import SpecError
from ncfm_core.progress import Progress
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from worker import stages
from worker.building import read_result_file, read_synthetic
from worker.evidence import Evidence, accuracy_in
from worker.history import HISTORY_FILE, Event, Notice, Picture, Stage, picture_step, read_history
from worker.plan import plan
from worker.records import StageResult
from worker.site import Site
from worker.storage import Storage

SiteOf = Callable[[int], Site]
Finish = Callable[[Stage], tuple[StageResult, list[Event]]]


class Job:
    """The stages of one job in one attempt."""

    def __init__(self, site: Site, storage: Storage, digits: Dataset, spec: JobSpec, finish: Finish) -> None:
        self.site, self.storage, self.digits, self.spec, self.finish = site, storage, digits, spec, finish
        self.plan = plan(spec, digits.digest)

    def teacher(self, index: int) -> Stage:
        return stages.teacher(
            self.site,
            self.storage,
            self.digits,
            key=str(self.plan.teachers[index].key),
            model=self.spec.model,
            training=self.spec.teachers.training,
            seed=self.spec.teachers.seed,
            index=index,
            held_out=None,
        )

    def distill(self, teachers: list[StageResult]) -> Stage:
        return stages.distill(
            self.site,
            self.storage,
            self.digits,
            key=str(self.plan.distill.key),
            teachers=teachers,
            model=self.spec.model,
            method=self.spec.method,
            ipc=self.spec.ipc,
            seed=self.spec.seed,
        )

    def evidence(self, distilled: StageResult) -> Evidence:
        entry, key = self.spec.evaluate[0], self.plan
        common: Any = (self.site, self.storage, self.digits)
        return Evidence(
            distilled=distilled,
            evaluations=[
                self.finish(
                    stages.evaluation(
                        *common, key=str(key.evaluations[0].key), distilled=distilled, entry=entry, seed=0
                    )
                )[0]
            ],
            random_real=[
                self.finish(
                    stages.random_real(
                        *common,
                        key=str(key.random_real[0].key),
                        ipc=1,
                        entry=entry,
                        seed=0,
                        model=self.spec.model,
                    )
                )[0]
            ],
            full_data=self.finish(
                stages.full_data(
                    *common, key=str(key.full_data.key), model=entry.model, recipe=self.spec.full_data, seed=0
                )
            )[0],
        )


JobOf = Callable[[int], Job]


@pytest.fixture
def job_of(site_of: SiteOf, storage: Storage, digits: Dataset, spec: JobSpec, finish: Finish) -> JobOf:
    return lambda attempt: Job(site_of(attempt), storage, digits, spec, finish)


def stop_after(stage: Stage, steps: int) -> None:
    """Run a stage until it reports a step, then end it the hard way."""
    for event in stage:
        if isinstance(event, Progress) and event.completed >= steps:
            stage.close()
            return
    raise AssertionError("the stage came to its end")


def content(storage: Storage, result: StageResult) -> dict[str, Any]:
    """Files of a result by name, the history without its clock."""
    files: dict[str, Any] = {file.name: storage.read_file(file) for file in result.files}
    rows = read_history(files[HISTORY_FILE]).rows
    files[HISTORY_FILE] = [
        {name: value for name, value in row.items() if name not in ("time", "psi_gain")} for row in rows
    ]
    return files


def test_stopped_distillation_ends_with_the_same_bits(job_of: JobOf, storage: Storage, finish: Finish) -> None:
    first = job_of(1)
    teachers = [finish(first.teacher(index))[0] for index in range(2)]
    undisturbed, events = finish(first.distill(teachers))
    expected = content(storage, undisturbed)
    storage.delete([path for path in storage.list("results") if storage.get_record(path, StageResult) == undisturbed])
    stop_after(job_of(2).distill(teachers), 40)
    assert {path.split("/")[3] for path in storage.list("checkpoints")} == {"2"}
    resumed, later = finish(job_of(3).distill(teachers))
    assert resumed.built_by == "job-3"
    assert Notice("the distillation goes on from step 40") in later
    assert content(storage, resumed) == expected
    assert [event.step for event in events if isinstance(event, Picture)] == [0, 6, 15, 30, 45, 60]
    assert [event.step for event in later if isinstance(event, Picture)] == [45, 60]


def test_checkpoint_of_a_cut_distillation_leads_another_job_to_the_very_set_of_an_undisturbed_one(
    job_of: JobOf, storage: Storage, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut where a window opens, so that psi climbs next: on images as the last step left them."""
    undisturbed, cut, other = (job_of(attempt) for attempt in (1, 2, 3))
    teachers = [finish(undisturbed.teacher(index))[0] for index in range(2)]
    method = undisturbed.spec.method.model_copy(update={"image_lr": 0.05})
    for job in (undisturbed, cut, other):
        job.spec = job.spec.model_copy(update={"method": method})
    whole, _ = finish(undisturbed.distill(teachers))
    storage.delete([path for path in storage.list("results") if storage.get_record(path, StageResult) == whole])
    looks = list[None]()

    def over(site: Site) -> bool:
        looks.append(None)
        return site.deadline is not None and len(looks) > 24

    monkeypatch.setattr(Site, "time_is_over", over)
    cut.site = replace(cut.site, deadline=time.time() + 1000.0, wall_seconds=1000.0)
    short, _ = finish(cut.distill(teachers))
    assert short.figures["steps"] == 21 and 21 % method.reuse == 0
    images = read_synthetic(storage, short).images
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert "grids/00000021.png" in {file.name for file in short.files}
    other.site = replace(other.site, job_id="other")
    resumed, events = finish(other.distill(teachers))
    assert Notice("the distillation goes on from step 21 of job job") in events
    expected, found = ({file.name: file.sha256 for file in each.files} for each in (whole, resumed))
    # The history alone says that there was a cut.
    assert expected.pop(HISTORY_FILE) and found.pop(HISTORY_FILE)
    assert found == expected


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_distillation_says_that_it_compiles_before_it_does(
    job_of: JobOf, finish: Finish, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """Compiling is only said here: the bound and the compiler are stand-ins."""
    monkeypatch.setitem(execution.COMPILE_OPERATIONS, "cpu", 0.0)
    monkeypatch.setattr(execution, "compiler_works", lambda kind: True)
    monkeypatch.setattr(distill, "compiled_form", lambda forward: forward)
    monkeypatch.setattr(training, "compiled_form", lambda forward: forward)
    job = job_of(1)
    teachers = [finish(job.teacher(index))[0] for index in range(2)]
    job.site = replace(job.site, deadline=None if seconds is None else time.time() + seconds)
    told = [event.message if isinstance(event, Notice) else event for event in finish(job.distill(teachers))[1]]
    progress = next(index for index, event in enumerate(told) if isinstance(event, Progress))
    before = [each for each in told[:progress] if isinstance(each, str)]
    assert before[0].startswith("the distillation is prepared")
    if seconds is None:
        assert before[-1].startswith("the distillation is compiled first: ")
        assert str(told[progress + 1]).startswith("the distillation runs compiled, ")
    else:
        assert before[-1].startswith("the distillation runs eager, ")


def test_stopped_teacher_ends_with_the_same_bits(job_of: JobOf, storage: Storage, finish: Finish) -> None:
    undisturbed, _ = finish(job_of(1).teacher(0))
    expected = content(storage, undisturbed)
    storage.delete(storage.list("results"))
    stop_after(job_of(2).teacher(0), 40)
    resumed, later = finish(job_of(3).teacher(0))
    assert Notice("teacher 0 goes on from step 40") in later
    assert Notice("teacher 0 is trained eager") in later
    assert content(storage, resumed) == expected


def test_stages_that_the_compiler_fails_go_on_eager_and_say_so_once(
    job_of: JobOf, storage: Storage, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = [finish(job_of(1).teacher(index))[0] for index in range(2)]
    eager = content(storage, finish(job_of(1).distill(undisturbed))[0])
    storage.delete(storage.list("results"))

    def broken(_: object) -> Callable[..., Tensor]:
        def run(*_: object, **__: object) -> Tensor:
            raise RuntimeError("no such header\nmuch more")

        return run

    for module in (execution, training):
        monkeypatch.setattr(module, "compiling_pays", lambda *_: True)
    for module in (distill, training):
        monkeypatch.setattr(module, "compiled_form", broken)
    failed = "compiling failed (RuntimeError: no such header)"
    teachers = []
    for index in range(2):
        result, events = finish(job_of(2).teacher(index))
        teachers.append(result)
        assert events.count(Notice(f"teacher {index} is trained eager after all: {failed}")) == 1
    result, events = finish(job_of(2).distill(teachers))
    (notice,) = [event for event in events if isinstance(event, Notice) and failed in event.message]
    assert notice.message.startswith("the distillation runs eager, ")
    assert content(storage, result) == eager
    for each in (*teachers, result):
        assert not each.figures["compiled"] and each.figures["compile_error"] == "RuntimeError: no such header"


def test_checkpoints_are_gone_once_the_result_is_there(job_of: JobOf, storage: Storage, finish: Finish) -> None:
    finish(job_of(1).teacher(0))
    assert storage.list("checkpoints") == []


def test_threads_of_the_checkpoint_are_kept(
    site_of: SiteOf, job_of: JobOf, storage: Storage, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job_of(1)
    first.site = Site(**{name: getattr(first.site, name) for name in first.site.__slots__} | {"threads": 2})
    stop_after(first.teacher(0), 44)
    result, _ = finish(job_of(2).teacher(0))
    assert result.environment["threads"] == 2


def test_result_says_where_it_was_made(job_of: JobOf, finish: Finish) -> None:
    result, _ = finish(job_of(1).teacher(0))
    assert result.environment["torch"] == torch.__version__
    assert result.environment["device"] == "cpu"
    assert result.environment["threads"] == 1
    assert isinstance(result.figures["accuracy"], float)
    assert result.seconds > 0


def test_published_files_hold_set_and_evidence(job_of: JobOf, storage: Storage, finish: Finish) -> None:
    job = job_of(1)
    distilled, _ = finish(job.distill([finish(job.teacher(index))[0] for index in range(2)]))
    evidence = job.evidence(distilled)
    key = str(job.plan.publish.key)
    published, _ = finish(stages.publish(job.site, storage, job.digits, key=key, evidence=evidence, spec=job.spec))
    names = {file.name for file in published.files}
    assert {"distilled/images.safetensors", "distilled/preview.png", "evaluation.json"} < names
    archive = zipfile.ZipFile(io.BytesIO(read_result_file(storage, published, "distilled-digits-ipc1.zip")))
    assert set(archive.namelist()) == names - {"distilled-digits-ipc1.zip"}
    document = json.loads(archive.read("evaluation.json"))
    assert document["evaluations"][0]["distilled"]["mean"] == evidence.figures(job.spec).distilled.mean
    assert document["results"]["distill"] == distilled.key
    again, _ = finish(
        stages.publish(job_of(2).site, storage, job.digits, key="sha256:" + "e" * 64, evidence=evidence, spec=job.spec)
    )
    assert {file.name: file.sha256 for file in again.files} == {file.name: file.sha256 for file in published.files}


def test_distilled_set_is_read_back(job_of: JobOf, storage: Storage, finish: Finish) -> None:
    job = job_of(1)
    distilled, _ = finish(job.distill([finish(job.teacher(index))[0] for index in range(2)]))
    synthetic = read_synthetic(storage, distilled)
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.factor == job.spec.method.factor
    assert sum(picture_step(file.name) is not None for file in distilled.files) == 6


def test_accuracy_counts_the_last_epoch_of_each_student(job_of: JobOf, finish: Finish) -> None:
    job = job_of(1)
    result, events = finish(
        stages.random_real(
            job.site,
            job.storage,
            job.digits,
            key="sha256:" + "f" * 64,
            ipc=1,
            entry=job.spec.evaluate[0],
            seed=0,
            model=job.spec.model,
        )
    )
    accuracy = accuracy_in(result)
    last = [event.metrics["accuracy"] for event in events if isinstance(event, Progress)]
    assert accuracy.values == tuple(last)
    assert accuracy.n == 2
    assert accuracy.mean == pytest.approx(sum(last) / 2)
    assert accuracy.std == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
    assert accuracy.best_mean >= accuracy.mean


def test_result_says_how_it_was_computed(job_of: JobOf, finish: Finish) -> None:
    job = job_of(1)
    teachers = [finish(job.teacher(index))[0] for index in range(2)]
    distilled, _ = finish(job.distill(teachers))
    evaluated, _ = judged_by(finish, job, job.spec.evaluate[0], kind="random_real")
    for result in (*teachers, distilled, evaluated):
        assert (result.figures["compiled"], result.figures["halvings"]) == (False, 0)
        assert "compile_error" not in result.figures
    assert distilled.figures["execution"] == {"chunk": 4096, "block": 10, "recompute": False}


def judged_by(
    finish: Finish,
    job: Job,
    entry: Any,
    *,
    kind: str,
    teacher: StageResult | None = None,
    labellers: Sequence[StageResult] = (),
) -> tuple[StageResult, list[Event]]:
    """One baseline under an evaluation of its own."""
    more: Any = {"model": job.spec.model, "labellers": labellers} | ({} if teacher is None else {"teacher": teacher})
    stage = getattr(stages, kind)(
        job.site, job.storage, job.digits, key=f"sha256:{kind:f<64}", ipc=1, entry=entry, seed=0, **more
    )
    return finish(stage)


def test_rate_is_chosen_for_the_set_at_hand_and_recorded(job_of: JobOf, finish: Finish) -> None:
    job = job_of(1)
    first = job.spec.evaluate[0]
    entry = first.model_copy(update={"lr_grid": (1e-7, 0.01)})
    result, events = judged_by(finish, job, entry, kind="random_real")
    assert result.figures["lr"] == 0.01
    rows = [event.metrics for event in events if isinstance(event, Progress)]
    assert [row["lr"] for row in rows if "lr" in row] == [1e-7, 0.01]
    assert [row["accuracy"] for row in rows if "accuracy" in row] == list(accuracy_in(result).values)


@pytest.mark.parametrize("kind", ["herding", "k_center"])
def test_coresets_are_judged_and_shown_like_random_images(job_of: JobOf, finish: Finish, kind: str) -> None:
    job = job_of(1)
    teacher, _ = finish(job.teacher(0))
    result, _ = judged_by(finish, job, job.spec.evaluate[0], kind=kind, teacher=teacher)
    assert result.stage == "evaluate"
    assert accuracy_in(result).n == 2
    again, _ = judged_by(finish, job, job.spec.evaluate[0], kind=kind, teacher=teacher)
    assert accuracy_in(again) == accuracy_in(result)


def test_soft_labels_are_stored_with_the_set_and_trained_on_by_all_sides(job_of: JobOf, finish: Finish) -> None:
    job = job_of(1)
    changes: dict[str, Any] = {
        "method": job.spec.document()["method"] | {"labels": "soft"},  # type: ignore[operator]
        "evaluate": [{"protocol": "apm", "students": 2, "tests": 1, "training": {"epochs": 20}}],
    }
    job = Job(job.site, job.storage, job.digits, resolve(job.spec.document() | changes), finish)
    teachers = [finish(job.teacher(index))[0] for index in range(job.spec.teachers.count)]
    distilled, _ = finish(job.distill(teachers))
    synthetic = read_synthetic(job.storage, distilled)
    assert synthetic.soft_labels is not None
    images, _ = synthetic.decode()
    assert synthetic.soft_labels.shape == (len(images), 10)
    assert synthetic.soft_labels.exp().sum(1).tolist() == pytest.approx([1.0] * len(images), abs=1e-4)
    entry = job.spec.evaluate[0]
    evaluated, _ = finish(
        stages.evaluation(
            job.site, job.storage, job.digits, key="sha256:" + "e" * 64, distilled=distilled, entry=entry, seed=0
        )
    )
    assert accuracy_in(evaluated).n == 2
    for kind, teacher in (("random_real", None), ("herding", teachers[0])):
        judged, _ = judged_by(finish, job, entry, kind=kind, teacher=teacher, labellers=teachers)
        assert accuracy_in(judged).n == 2
        with pytest.raises(SpecError, match="soft labels"):
            judged_by(finish, job, entry, kind=kind, teacher=teacher)
