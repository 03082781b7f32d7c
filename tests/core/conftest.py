"""Small real data and networks for the tests of the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.execution import compiler_works
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve

CPU = torch.device("cpu")


@pytest.fixture
def compiler() -> None:
    """For tests that compile; tried here and not when tests are collected, since it takes seconds."""
    if not compiler_works("cpu"):
        pytest.skip("no C++ compiler that works on this machine")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", data_dir=Path("unused"))


@pytest.fixture(scope="session")
def spec() -> JobSpec:
    """digits at a width and a number of steps that take a second."""
    return resolve(
        {
            "dataset": "digits",
            "ipc": 1,
            "model": {"width": 16},
            "teachers": {"count": 2, "training": {"epochs": 6}},
            "method": {"steps": 12, "reuse": 5, "num_frequencies": 64, "num_components": 8, "real_batch": 64},
            "evaluate": [{"students": 2, "tests": 2, "training": {"epochs": 20}}],
        }
    )


@pytest.fixture(scope="session")
def pool(digits: Dataset, spec: JobSpec) -> TeacherPool:
    teachers = []
    for index in range(spec.teachers.count):
        teacher = TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=index, device=CPU)
        for _ in teacher.run():
            pass
        teachers.append(teacher.result())
    return TeacherPool(spec.model, digits, teachers, CPU)
