"""Where a test can have the controller die: named points between its side effects, so that each of them is tried.

`NCFM_CRASH_AT` names one (service/settings.py); nothing else sets it, and without it a point is nothing.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from ncfm_core.errors import NcfmError

CrashPoint = Literal[
    "after_lease",
    "after_look",
    "before_claim",
    "after_claim",
    "before_submit",
    "after_spec_written",
    "after_submit",
    "before_move_running",
    "after_move_running",
    "after_stage_noted",
    "after_wait_noted",
    "before_move_recovering",
    "after_move_recovering",
    "before_log_kept",
    "after_log_kept",
    "after_result_read",
    "before_terminal_move",
    "after_terminal_move",
    "before_stop_json",
    "after_stop_json",
    "before_stop",
    "after_ray_stop",
    "after_remains_asked",
    "before_publish_submit",
    "after_publish_submit",
    "before_publish_noted",
    "after_publish_noted",
    "before_sighting",
    "after_sighting",
    "before_release",
]
POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)

EXIT_KILLED = 137
"""As after kill -9."""

_armed: list[str] = []


class UnknownCrashPoint(NcfmError):
    """NCFM_CRASH_AT names no point."""

    code = "invalid_settings"


def arm(name: str) -> None:
    """Let this process die where it first reaches a point; nowhere where the name is empty.

    Raises:
        UnknownCrashPoint: there is no such point.
    """
    if name and name not in POINTS:
        raise UnknownCrashPoint.of("NCFM_CRASH_AT", name, "there is no such point", "It is for tests alone: unset it.")
    _armed[:] = [name] if name else []


def reached(name: CrashPoint) -> None:
    """Die here, without a word and without an exit handler, if a test asked for it."""
    if name in _armed:
        os._exit(EXIT_KILLED)
