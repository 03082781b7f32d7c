from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.jobs import (
    ACTIVE,
    FORMER_MOVES,
    MOVES,
    IllegalMove,
    Job,
    Reason,
    State,
    cancel_move,
    check_move,
    first_id_at,
    legal_moves,
    moves_table,
    new_job_id,
)
from service.reports import Progress, changed_stages, progress_of
from worker.records import AttemptStatus, StageName


def a_job(state: State, reason: Reason | None = None) -> Job:
    return Job(
        id=new_job_id(),
        state=state,
        reason=reason,
        requested={},
        spec={},
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize(("state", "to"), list(itertools.product(State, State)))
def test_check_move_when_the_table_has_it_or_not(state: State, to: State) -> None:
    if to in MOVES[state]:
        check_move(a_job(state), to)
    else:
        with pytest.raises(IllegalMove, match=f"a {state} job cannot become {to}"):
            check_move(a_job(state), to)


def test_moves_when_walked() -> None:
    assert set(MOVES) == set(State)
    assert {state for state in State if state.is_terminal} == {State.SUCCEEDED, State.FAILED, State.CANCELLED}
    assert set(ACTIVE) == {State.STARTING, State.RUNNING, State.RECOVERING, State.CANCELLING}
    reached = {State.QUEUED}
    for _ in State:
        reached |= {to for state in reached for to in MOVES[state]}
    assert reached == set(State)


@pytest.mark.parametrize("state", list(State))
def test_cancel_move_when_legal_stays_in_the_table(state: State) -> None:
    for reason in (None, *Reason):
        try:
            to = cancel_move(a_job(state, reason))
        except IllegalMove as error:
            assert state in (State.SUCCEEDED, State.FAILED)
            assert "submit a new job" in str(error)
        else:
            assert to is None or to in MOVES[state]


def test_cancel_move_when_a_driver_may_live_waits_for_its_end() -> None:
    assert cancel_move(a_job(State.QUEUED)) is State.CANCELLED
    for reason in Reason:
        # However it was lost: a stage may outlive its driver.
        assert cancel_move(a_job(State.RECOVERING, reason)) is State.CANCELLING
    assert cancel_move(a_job(State.RUNNING)) is State.CANCELLING
    assert cancel_move(a_job(State.CANCELLING)) is None


def test_moves_when_something_of_a_job_may_run_do_not_end_it_as_cancelled() -> None:
    assert {state for state in State if State.CANCELLED in MOVES[state]} == {State.QUEUED, State.CANCELLING}
    assert not [(origin, to) for origin, to in FORMER_MOVES if to in MOVES[origin]]


def test_changed_stages_are_those_that_stand_otherwise() -> None:
    before = {"inspect": "done", "distill": "running"}
    assert changed_stages(before, before) == {}
    assert changed_stages(before, {"distill": "done", "publish": "pending"}) == {
        "distill": "done",
        "publish": "pending",
    }


def test_texts_when_read_by_a_person() -> None:
    assert legal_moves(State.CANCELLING) == "From cancelling a job may become: succeeded, cancelled."
    table = moves_table().splitlines()
    assert len(table) == 2 + len(State)
    assert "| queued | starting, cancelled |" in table
    assert "| failed | final |" in table


def test_first_id_at_a_time_parts_the_ids_before_it_from_those_after() -> None:
    before = datetime.now(UTC)
    made = new_job_id()
    assert first_id_at(before) <= made < first_id_at(before, 1.0)
    assert first_id_at(datetime(1, 1, 1, tzinfo=UTC)) == "0" * 26
    assert first_id_at(datetime(9999, 12, 31, tzinfo=UTC), 60.0) > made


def test_new_job_id_when_made_later_sorts_later() -> None:
    first = new_job_id()
    assert len(first) == 26
    assert first == first.lower()
    assert first.isalnum()
    assert new_job_id()[:10] >= first[:10]


def said(completed: int, at: float, *, stage: StageName = "distill", **more: Any) -> AttemptStatus:
    return AttemptStatus(
        job_id="j",
        attempt=1,
        stage=stage,
        completed=completed,
        total=1000,
        unit="step",
        message="",
        stages={},
        heartbeat_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at),
        mlflow_run_id=None,
        mlflow_url=None,
        **more,
    )


def test_progress_of_the_whole_job_is_the_drivers() -> None:
    first = progress_of(said(400, 0, job_percent=20.0))
    assert (first.job_percent, first.job_eta_seconds) == (20.0, None)
    # The stage stands still, another beside it does not.
    second = progress_of(said(400, 5, job_percent=25.0, job_eta_seconds=60.0), first)
    assert (second.completed, second.job_percent, second.job_eta_seconds) == (400, 25.0, 60.0)
    assert second.since == first.since
    assert progress_of(said(400, 7, job_percent=25.0, job_eta_seconds=60.0), second) is second
    following = progress_of(said(0, 9, stage="evaluate", job_percent=50.0), second)
    assert (following.percent, following.job_percent) == (0.0, 50.0)


def test_progress_when_a_stage_counts_anew_begins_its_rate_anew() -> None:
    parts = progress_of(said(0, 0).model_copy(update={"total": 1, "unit": "part"}))
    resumed = progress_of(said(500, 1), parts)
    assert (resumed.percent, resumed.since_completed, resumed.eta_seconds) == (50.0, 500, None)


def test_progress_when_a_stage_goes_on_knows_its_rate() -> None:
    first = progress_of(said(400, 0))
    assert (first.percent, first.eta_seconds) == (40.0, None)
    second = progress_of(said(500, 10), first)
    # 100 steps in 10 s, of which 500 are left: what a checkpoint had done before does not count.
    assert (second.percent, second.eta_seconds) == (50.0, 50.0)
    assert progress_of(said(500, 12), second) is second
    assert progress_of(said(600, 30), second).eta_seconds == 60.0


def test_progress_when_another_stage_begins_or_one_falls_back_begins_anew() -> None:
    before = progress_of(said(500, 10), progress_of(said(400, 0)))
    for after in (progress_of(said(10, 20, stage="evaluate"), before), progress_of(said(300, 20), before)):
        assert (after.since, after.since_completed, after.eta_seconds) == (after.updated_at, after.completed, None)


def test_progress_when_nothing_is_known_shows_nothing() -> None:
    progress = Progress(stage=None, completed=0, total=0, unit="")
    assert (progress.percent, progress.eta_seconds) == (None, None)
