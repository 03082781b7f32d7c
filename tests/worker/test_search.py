"""What the driver learns of Ray Tune's trials."""

from __future__ import annotations

from types import SimpleNamespace

from worker.search import _Collector


def trial(name: str, status: str = "TERMINATED", error: str = "") -> SimpleNamespace:
    return SimpleNamespace(trial_id=name, config={"image_lr": 0.1}, status=status, get_error=lambda: error or None)


def test_trials_that_never_came_to_run_are_counted_as_lost() -> None:
    collector = _Collector(3, 2, lambda progress: None)
    fine, broken, unheard = trial("a"), trial("b", "ERROR", "out of memory"), trial("c", "ERROR")
    collector.on_trial_start(0, [], fine)
    collector.on_trial_result(0, [], fine, {"step": 5, "accuracy": 50.0})
    collector.on_trial_start(0, [], broken)
    collector.on_trial_error(0, [], broken)
    collector.on_experiment_end([fine, broken, unheard])
    errors = [each.error for each in collector.trials.values()]
    assert errors == ["", "out of memory", "lost: Ray Tune could not start it"]
    assert [each.index for each in collector.trials.values()] == [0, 1, 2]
