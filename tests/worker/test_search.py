"""What the driver learns of Ray Tune's trials."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from ncfm_core.errors import ResourcesError
from worker.search import _Collector, _last_failure, _raised_in


def raised(error: Exception) -> Exception:
    """As an error comes from a process of the cluster."""
    try:
        raise error
    except type(error) as caught:
        return cast(
            Exception,
            cast(Any, RayTaskError)(
                "train", traceback.format_exc(), caught, "ray::ImplicitFunc.train"
            ).as_instanceof_cause(),
        )


def trial(name: str, status: str = "TERMINATED", *errors: Exception, folder: Path | None = None) -> SimpleNamespace:
    """With its file of failures as Tune writes it (`Trial.handle_error`)."""
    file = (folder or Path()) / name
    if errors:
        told = [f"Failure # {number} (occurred at 2026-11-29)\n{error}\n" for number, error in enumerate(errors, 1)]
        file.write_text("".join(told))
    return SimpleNamespace(
        trial_id=name,
        config={"image_lr": 0.1},
        status=status,
        get_error=lambda: None,
        error_file=str(file) if errors else None,
    )


def test_trials_that_were_lost_are_told_from_those_that_failed_by_themselves(tmp_path: Path) -> None:
    collector = _Collector(4, 2, lambda progress: None)
    fine, broken, gone, unheard = (
        trial("a"),
        trial("b", "ERROR", raised(ValueError("out of memory")), folder=tmp_path),
        trial("c", "ERROR", ActorDiedError(), folder=tmp_path),
        trial("d", "ERROR"),
    )
    collector.on_trial_start(0, [], fine)
    collector.on_trial_result(0, [], fine, {"step": 5, "accuracy": 50.0})
    collector.on_trial_complete(0, [], fine)
    for each in (broken, gone):
        collector.on_trial_start(0, [], each)
        collector.on_trial_error(0, [], each)
    collector.on_experiment_end([fine, broken, gone, unheard])
    found = list(collector.trials.values())
    assert [each.is_lost for each in found] == [False, False, True, True]
    assert [each.is_over for each in found] == [True, True, True, False]
    assert [bool(each.error) for each in found] == [False, True, True, True]
    assert found[1].error == "ValueError: out of memory"
    assert found[2].error == "The actor died unexpectedly before finishing this task."
    assert found[3].error == "lost: Ray Tune could not start it"
    assert [each.index for each in found] == [0, 1, 2, 3]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([KeyError("width")], "KeyError: 'width'"),
        ([ValueError()], "ValueError"),
        ([ResourcesError.of("a.b", 1, "two\nlines", "hint")], "ResourcesError: a.b: two"),
        ([caused(ValueError("outer"), KeyError("inner"))], "ValueError: outer"),
        ([ValueError("many\n\nray::lines\n  of it")], "ValueError: many"),
        ([KeyError("first"), ValueError("second")], "ValueError: second"),
    ],
)
def test_failure_of_a_trial_is_told_by_the_name_of_its_error_and_a_line(
    tmp_path: Path, errors: list[Exception], told: str
) -> None:
    assert _raised_in(_last_failure(trial("a", "ERROR", *map(raised, errors), folder=tmp_path))) == told


def test_trial_that_was_lost_after_it_had_failed_counts_as_lost(tmp_path: Path) -> None:
    errors = (raised(ValueError("out of memory")), ActorDiedError())
    assert _raised_in(_last_failure(trial("a", "ERROR", *errors, folder=tmp_path))) is None


def test_trial_that_begins_again_reports_from_its_start() -> None:
    collector, told = _Collector(1, 2, lambda progress: told.append(progress.completed)), list[int]()
    one = trial("a")
    for _ in range(2):
        collector.on_trial_start(0, [], one)
        collector.on_trial_result(0, [], one, {"step": 5, "accuracy": 50.0})
        collector.on_trial_recover(0, [], one)
    assert told == [1, 1]
    assert collector.trials["a"].rows == []
