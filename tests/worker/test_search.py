"""What the driver learns of Ray Tune's trials."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError

from worker.search import _Collector

OWN: Exception = cast(Any, RayTaskError)("train", "Traceback", ValueError("out of memory"))


def trial(
    name: str, status: str = "TERMINATED", error: Exception | None = None, *, folder: Path | None = None
) -> SimpleNamespace:
    file = (folder or Path()) / name
    if error is not None:
        file.write_bytes(cast(Any, cloudpickle).dumps(error))
    return SimpleNamespace(
        trial_id=name,
        config={"image_lr": 0.1},
        status=status,
        get_error=lambda: None,
        pickled_error_file=str(file) if error else None,
    )


def test_trials_that_were_lost_are_told_from_those_that_failed_by_themselves(tmp_path: Path) -> None:
    collector = _Collector(4, 2, lambda progress: None)
    fine, broken, gone, unheard = (
        trial("a"),
        trial("b", "ERROR", OWN, folder=tmp_path),
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
    assert found[3].error == "lost: Ray Tune could not start it"
    assert [each.index for each in found] == [0, 1, 2, 3]


def test_trial_that_begins_again_reports_from_its_start() -> None:
    collector, told = _Collector(1, 2, lambda progress: told.append(progress.completed)), list[int]()
    one = trial("a")
    for _ in range(2):
        collector.on_trial_start(0, [], one)
        collector.on_trial_result(0, [], one, {"step": 5, "accuracy": 50.0})
        collector.on_trial_recover(0, [], one)
    assert told == [1, 1]
    assert collector.trials["a"].rows == []
