"""Rows of a stage."""

from __future__ import annotations

import math

from ncfm_core.progress import Progress
from worker.history import History, picture_step, read_history


def test_history_survives_its_file() -> None:
    history = History()
    history.add(Progress(25, 100, "step", {"loss": 0.5}))
    history.add(Progress(50, 100, "step", {"loss": 0.25}))
    assert read_history(history.encode()).rows == history.rows
    assert [(row["step"], row["loss"]) for row in history.rows] == [(25, 0.5), (50, 0.25)]


def test_step_is_kept_once_when_reported_again() -> None:
    history = History()
    history.add(Progress(25, 100, "step", {"loss": 0.5}))
    history.add(Progress(25, 100, "step", {"loss": 0.7}))
    assert [row["loss"] for row in history.rows] == [0.5]


def test_what_is_not_finite_is_left_out() -> None:
    history = History()
    history.add(Progress(1, 2, "step", {"loss": math.nan, "rate": 0.1}))
    assert history.rows[0].keys() == {"step", "time", "rate"}


def test_report_without_metrics_makes_no_row() -> None:
    history = History()
    history.add(Progress(1, 2, "set"))
    assert history.encode() == b""


def test_pictures_are_known_by_their_names() -> None:
    assert picture_step("grids/00000125.png") == 125
    assert picture_step("preview.png") is None
    assert picture_step("grids/readme.txt") is None
