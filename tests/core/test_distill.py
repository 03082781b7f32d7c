from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.errors import CheckpointError
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.spec import JobSpec, NcfmSpec
from ncfm_core.submission import resolve

CPU = torch.device("cpu")


def distillation(digits: Dataset, pool: TeacherPool, method: NcfmSpec, *, ipc: int = 1, seed: int = 0) -> Distillation:
    return Distillation(digits, pool, method, ipc=ipc, seed=seed, device=CPU)


def changed(spec: JobSpec, **method: Any) -> NcfmSpec:
    return resolve(spec.document() | {"method": spec.document()["method"] | method}).method  # type: ignore[operator]


@pytest.mark.parametrize("sampler", ["scale_mixture", "gaussian"])
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 11])
def test_distillation_that_was_stopped_goes_on_with_the_same_bits(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, sampler: str, stop: int
) -> None:
    method = changed(spec, sampler=sampler)
    whole, first, second = (distillation(digits, pool, method) for _ in range(3))
    for _ in whole.run():
        pass
    for _ in first.run(until=stop):
        pass
    second.load_state(first.state())
    for _ in second.run():
        pass
    assert second.step == second.total
    assert torch.equal(whole.synthetic.images, second.synthetic.images)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_reports_do_not_change_the_bits(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    whole, pieces = (distillation(digits, pool, spec.method) for _ in range(2))
    for _ in whole.run():
        pass
    for stop in range(1, 13):
        for _ in pieces.run(until=stop):
            pass
    assert torch.equal(whole.synthetic.images, pieces.synthetic.images)


def test_a_run_ends_at_its_last_step_however_far_it_is_asked_to_go(
    digits: Dataset, pool: TeacherPool, spec: JobSpec
) -> None:
    whole, farther = (distillation(digits, pool, spec.method) for _ in range(2))
    list(whole.run())
    list(farther.run(until=farther.total + 7))
    assert farther.step == farther.total and not list(farther.run(until=farther.total + 1))
    assert torch.equal(whole.synthetic.images, farther.synthetic.images)


def test_no_network_parameter_ever_has_a_gradient(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    run = distillation(digits, pool, spec.method)
    for _ in run.run(until=2):
        pass
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in pool.network.parameters())


def test_images_stay_in_range_and_change(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    run = distillation(digits, pool, spec.method)
    before = run.synthetic.images.detach().clone()
    for _ in run.run():
        pass
    images = run.synthetic.images.detach()
    assert 0 <= images.min() and images.max() <= 1
    assert (images - before).abs().mean() > 0.005


def test_update_of_a_class_does_not_depend_on_the_other_classes_images(
    digits: Dataset, pool: TeacherPool, spec: JobSpec
) -> None:
    method = changed(spec, sampler="gaussian", schedule="constant")
    plain, disturbed = (distillation(digits, pool, method) for _ in range(2))
    with torch.no_grad():
        disturbed.synthetic.images[1:] = 0.3
    for run in (plain, disturbed):
        for _ in run.run(until=4):
            pass
    torch.testing.assert_close(plain.synthetic.images[0], disturbed.synthetic.images[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain.synthetic.images[1], disturbed.synthetic.images[1], atol=1e-2)


def first_classes(dataset: Dataset, number: int) -> Dataset:
    """Its first classes, each cut to its first 100 training images: draws are made for the largest class of all."""
    members = dataset.members[:number, :100].flatten()
    tested = dataset.test_labels < number
    return replace(
        dataset,
        train_images=dataset.train_images[members],
        train_labels=dataset.train_labels[members],
        test_images=dataset.test_images[tested],
        test_labels=dataset.test_labels[tested],
        class_names=dataset.class_names[:number],
    )


@pytest.mark.parametrize("ipc", [1, 2])
@pytest.mark.parametrize("discrepancy", ["characteristic", "mean"])
def test_update_of_a_class_does_not_depend_on_how_many_classes_there_are(
    digits: Dataset, spec: JobSpec, discrepancy: str, ipc: int
) -> None:
    """Alone, among 3, among 10: the same draws, for each is a row of its own, and the same path. Psi, which hears all classes,
    and calibration, whose logits are of all classes, are rightly left out."""
    method = changed(
        spec, discrepancy=discrepancy, sampler="gaussian", schedule="constant", calibration_weight=0.0, init="real"
    )
    teachers = []
    for index in range(2):
        teacher = TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=index, device=CPU)
        list(teacher.run(until=20))
        teachers.append(teacher.result())
    paths = []
    for number in (1, 3, 10):
        fewer = first_classes(digits, number)
        cut = [
            {name: value[:number] if ".classifier." in name else value for name, value in each.items()}
            for each in teachers
        ]
        run = distillation(fewer, TeacherPool(spec.model, fewer, cut, CPU), method, ipc=ipc)
        before = run.synthetic.images[:ipc].detach().clone()
        for _ in run.run(until=7):
            pass
        assert run.execution.block == number
        paths.append((before, run.synthetic.images[:ipc].detach()))
    for before, after in paths[:2]:
        assert torch.equal(before, paths[2][0])
        assert (after - before).abs().mean() > 0.005
        torch.testing.assert_close(after, paths[2][1], atol=1e-5, rtol=1e-4)


def test_psi_moves_and_reports_its_gain(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    run = distillation(digits, pool, changed(spec, sampler_lr=0.01))
    reports = list(run.run())
    assert reports[-1].metrics["psi_gain"] > 0
    assert run.state()["sampler.log_scales"].abs().max() > 0.01


def test_discrepancy_falls(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    run = distillation(digits, pool, changed(spec, steps=100, calibration_weight=0.0))
    reports = list(run.run())
    assert reports[-1].metrics["discrepancy"] < 0.9 * reports[0].metrics["discrepancy"]


@pytest.mark.parametrize(
    "change", [{"init": "noise"}, {"init": "real", "factor": 1}, {"amplitude_weight": 0.2}, {"precision": "bfloat16"}]
)
def test_every_variant_runs(digits: Dataset, pool: TeacherPool, spec: JobSpec, change: dict[str, Any]) -> None:
    run = distillation(digits, pool, changed(spec, **change), ipc=2)
    for report in run.run(until=6):
        assert all(value == value for value in report.metrics.values())
    assert run.synthetic.images.isfinite().all()


@pytest.mark.parametrize(
    "model",
    [
        {"norm": "batch", "width": 8},
        {"name": "resnet18", "width": 4},
        {"name": "resnet18_ap", "width": 4, "norm": "batch"},
        {"name": "alexnet", "width": 4},
    ],
    ids=str,
)
def test_every_network_distils(digits: Dataset, model: dict[str, Any]) -> None:
    spec = resolve(
        {
            "dataset": "digits",
            "ipc": 1,
            "model": model,
            "teachers": {"count": 1, "training": {"epochs": 1, "augment": {"policy": "none"}}},
            "method": {"steps": 4, "reuse": 2, "num_frequencies": 64, "num_components": 8, "real_batch": 16},
        }
    )
    teacher = TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=0, device=CPU)
    for _ in teacher.run():
        pass
    pool = TeacherPool(spec.model, digits, [teacher.result()], CPU)
    run = distillation(digits, pool, spec.method)
    before = run.synthetic.images.detach().clone()
    buffers = {name: stack.clone() for name, stack in pool._buffers.items()}
    for report in run.run():
        assert all(value == value for value in report.metrics.values())
    assert ((run.synthetic.images - before).abs().amax((1, 2, 3)) > 0).all()
    assert all(torch.equal(stack, buffers[name]) for name, stack in pool._buffers.items())


def test_state_of_another_distillation_is_refused(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        distillation(digits, pool, spec.method).load_state(distillation(digits, pool, spec.method, ipc=2).state())


def test_pause_ends_a_run_after_that_step_and_costs_no_bits(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    whole = distillation(digits, pool, spec.method)
    for _ in whole.run():
        pass
    paused = distillation(digits, pool, spec.method)
    reports = list(paused.run(pause=lambda: paused.step >= 7))
    assert (paused.step, reports[-1].completed) == (7, 7)
    state = paused.state()
    paused.end_here()
    images = paused.synthetic.images.detach()
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    resumed = distillation(digits, pool, spec.method)
    resumed.load_state(state)
    for _ in resumed.run():
        pass
    assert torch.equal(resumed.result().images, whole.result().images)
