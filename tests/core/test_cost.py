from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ncfm_core.cost import DAY_SECONDS, START_SECONDS, costs, estimate, forward, operations
from ncfm_core.submission import resolve


def seconds(gpus: float = 0, cpus: float = 2, **submission: Any) -> float:
    return estimate(resolve(dict[str, Any](dataset="cifar10", ipc=10) | submission), cpus=cpus, gpus=gpus).seconds


def test_paper_preset_takes_days_on_a_cpu_and_not_on_a_gpu() -> None:
    assert seconds() > DAY_SECONDS > seconds(gpus=1)
    assert "days on 2 CPU cores" in estimate(resolve({"dataset": "cifar10", "ipc": 10}), cpus=2, gpus=0).text


def test_quick_preset_takes_less_than_an_hour_on_a_cpu() -> None:
    assert seconds(preset="quick") < 3600
    assert seconds(dataset="digits", ipc=1) < 120


def test_more_work_costs_more() -> None:
    assert seconds(preset="quick", method={"steps": 1200}) > seconds(preset="quick")
    assert seconds(preset="quick", ipc=50) > seconds(preset="quick")
    assert seconds(preset="quick", method={"reuse": 1}) > seconds(preset="quick")


@pytest.mark.parametrize("search", [None, {"trials": 2, "space": {"image_lr": [0.01, 0.02]}}])
def test_costs_of_the_results_are_those_of_the_job(search: Any) -> None:
    document = {"dataset": "digits", "ipc": 1, "baselines": ["random_real", "herding"], "search": search}
    spec = resolve({name: value for name, value in document.items() if value is not None})
    each, teachers = costs(spec), spec.teachers.count * (2 if search else 1)
    assert (each.search > 0) == (search is not None)
    parts = teachers * each.teacher + each.search + each.distill + 3 * sum(each.judged) + each.full_data
    assert operations(spec) == pytest.approx(parts)


def test_costs_follow_the_facts_that_are_given() -> None:
    spec = resolve({"dataset": {"name": "imagefolder", "uri": "/data/birds", "image_size": 32}, "ipc": 1})
    facts = replace(spec.dataset.facts, num_train=20 * spec.dataset.facts.num_train)
    assert costs(spec, facts).teacher == pytest.approx(20 * costs(spec).teacher)


def test_no_job_takes_less_than_its_start() -> None:
    spec = resolve({"dataset": "digits", "ipc": 1})
    assert estimate(spec, cpus=2, gpus=0, work=0.0, stages=0).seconds == START_SECONDS


def test_gpu_that_was_declined_does_not_count() -> None:
    assert seconds(gpus=1, resources={"gpus": 0}) == seconds(gpus=0)


def test_forward_counts_two_for_each_multiply_and_add() -> None:
    model = resolve({"dataset": "cifar10", "ipc": 1}).model
    assert forward(model, 32, 3) == 2 * 9 * (3 * 128 * 32**2 + 128**2 * 16**2 + 128**2 * 8**2)
