"""Which trial wins."""

from __future__ import annotations

import pytest

from ncfm_core.submission import resolve
from worker.plan import plan
from worker.trials import SearchError, Trial, best_of, best_spec, read_trials, write_trial

DATA = "sha256:" + "0" * 64


def trial(index: int, *accuracies: float, error: str = "") -> Trial:
    rows = [{"step": float(i), "time": 0.0, "accuracy": value} for i, value in enumerate(accuracies, 1)]
    return Trial(index=index, params={"image_lr": 0.01 * (index + 1)}, rows=rows, error=error)


def test_best_is_among_those_that_came_furthest() -> None:
    assert best_of([trial(0, 95.0), trial(1, 60.0, 80.0), trial(2, 70.0, 79.0)]).index == 1


def test_first_of_equals_wins() -> None:
    assert best_of([trial(0, 80.0), trial(1, 80.0)]).index == 0


def test_failed_trials_are_passed_over() -> None:
    assert best_of([trial(0, error="boom"), trial(1, 50.0)]).index == 1


def test_search_fails_when_every_trial_did() -> None:
    with pytest.raises(SearchError, match="boom"):
        best_of([trial(0, error="boom"), trial(1, error="boom")])


def test_trials_survive_their_file() -> None:
    trials = [trial(0, 1.0, 2.0), trial(1, error="x")]
    assert read_trials(b"".join(write_trial(each) for each in trials)) == trials


def test_best_spec_is_a_submission_with_the_keys_of_the_search_job() -> None:
    searched = resolve({"dataset": "digits", "ipc": 1, "search": {"space": {"image_lr": [0.02, 0.03]}}})
    best = best_spec(searched, {"image_lr": 0.03})
    again = resolve(best.document())
    assert again == best
    assert best.method.image_lr == 0.03
    assert best.search is None
    assert plan(again, DATA).distill.key == plan(best, DATA).distill.key
