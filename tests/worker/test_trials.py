"""Which trial wins."""

from __future__ import annotations

import pytest

from ncfm_core.submission import resolve
from worker.plan import plan
from worker.trials import (
    SearchCutError,
    SearchError,
    Trial,
    best_of,
    best_spec,
    check_complete,
    read_trials,
    write_trial,
)

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


def over(trial: Trial, *, is_lost: bool = False) -> Trial:
    trial.is_over, trial.is_lost = True, is_lost
    return trial


def test_search_is_complete_when_each_trial_came_to_its_end_or_failed_by_itself() -> None:
    check_complete([over(trial(0, 1.0, 2.0)), over(trial(1, 1.0)), over(trial(2, error="boom"))], 3)


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        ([over(trial(0, 1.0))], "it ended with 1 of its 2 trials, 0 were lost"),
        ([over(trial(0, 1.0)), trial(1, 1.0)], "it ended with 1 of its 2 trials, 0 were lost"),
        (
            [over(trial(0, 1.0)), over(trial(1, error="node died"), is_lost=True)],
            "it ended with 1 of its 2 trials, 1 were lost: node died",
        ),
    ],
)
def test_search_that_was_broken_off_says_what_it_lacks(trials: list[Trial], told: str) -> None:
    with pytest.raises(SearchCutError, match=told):
        check_complete(trials, 2)
