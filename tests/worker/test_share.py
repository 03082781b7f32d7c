"""How far a whole job is."""

from __future__ import annotations

import pytest

from ncfm_core.progress import Progress
from worker.driver import share as share_module
from worker.driver.share import JobShare, Part

TEACHER: Part = ("teachers", "teacher 0")
DISTILL: Part = ("distill", "distill")
JUDGED: Part = ("evaluate", "evaluation 0")
WEIGHTS = {TEACHER: 10.0, DISTILL: 30.0, JUDGED: 60.0}


class Clock:
    """Stands for `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(share_module, "time", made)
    return made


@pytest.fixture
def share(clock: Clock) -> JobShare:
    made = JobShare()
    made.weigh(WEIGHTS)
    return made


def at(step: int, **metrics: float) -> Progress:
    return Progress(step, 100, "step", metrics)


def test_nothing_is_told_before_the_parts_are_known() -> None:
    share = JobShare()
    share.finished(("inspect", "data"), cached=False)
    assert (share.percent, share.eta_seconds) == (None, None)
    share.weigh(WEIGHTS)
    assert (share.percent, share.eta_seconds) == (0.0, None)


def test_parts_count_by_their_weight_and_the_rest_by_the_rate_so_far(share: JobShare, clock: Clock) -> None:
    share.started(TEACHER)
    clock.now += 20
    share.finished(TEACHER, cached=False)
    # 10 of 100 took 20 s.
    assert (share.percent, share.eta_seconds) == (10.0, 180.0)
    share.started(DISTILL)
    clock.now += 10
    share.progressed(DISTILL, at(50, loss=1.0))
    assert (share.percent, share.eta_seconds) == (25.0, 90.0)
    share.finished(DISTILL, cached=False)
    share.finished(JUDGED, cached=False)
    assert (share.percent, share.eta_seconds) == (100.0, 0.0)


def test_stored_parts_weigh_nothing_and_take_no_time(share: JobShare, clock: Clock) -> None:
    share.finished(JUDGED, cached=True)
    assert (share.percent, share.eta_seconds) == (0.0, None)
    share.started(TEACHER)
    clock.now += 5
    share.finished(TEACHER, cached=False)
    assert (share.percent, share.eta_seconds) == (25.0, 15.0)


def test_what_a_checkpoint_had_done_counts_for_the_share_and_not_for_the_rate(share: JobShare, clock: Clock) -> None:
    for part in (TEACHER, JUDGED):
        share.finished(part, cached=True)
    share.started(DISTILL)
    share.progressed(DISTILL, at(60))
    assert (share.percent, share.eta_seconds) == (60.0, None)
    clock.now += 10
    share.progressed(DISTILL, at(80, loss=1.0))
    assert (share.percent, share.eta_seconds) == (80.0, 10.0)


def test_share_never_falls(share: JobShare) -> None:
    share.started(DISTILL)
    share.progressed(DISTILL, at(100, loss=1.0))
    assert share.percent == 30.0
    share.progressed(DISTILL, at(20))
    assert share.percent == 30.0
    share.reopened(DISTILL)
    share.weigh(WEIGHTS | {DISTILL: 300.0})
    assert share.percent == 30.0
