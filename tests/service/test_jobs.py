from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest

from service.jobs import (
    ACTIVE,
    MOVES,
    IllegalMove,
    Job,
    Reason,
    State,
    cancel_move,
    check_move,
    legal_moves,
    moves_table,
    new_job_id,
)


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
    assert cancel_move(a_job(State.RECOVERING, Reason.WORKER_LOST)) is State.CANCELLED
    assert cancel_move(a_job(State.RECOVERING, Reason.CLUSTER_LOST)) is State.CANCELLING
    assert cancel_move(a_job(State.RUNNING)) is State.CANCELLING
    assert cancel_move(a_job(State.CANCELLING)) is None


def test_texts_when_read_by_a_person() -> None:
    assert legal_moves(State.CANCELLING) == "From cancelling a job may become: succeeded, cancelled."
    table = moves_table().splitlines()
    assert len(table) == 2 + len(State)
    assert "| queued | starting, cancelled |" in table
    assert "| failed | final |" in table


def test_new_job_id_when_made_later_sorts_later() -> None:
    first = new_job_id()
    assert len(first) == 26
    assert first == first.lower()
    assert first.isalnum()
    assert new_job_id()[:10] >= first[:10]
