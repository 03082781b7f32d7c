"""What a stage says while it runs, and the record of it that its result keeps. Light.

A stage is a generator of events whose return value is its committed result. `history.jsonl` holds one row for each `Progress`:
`step`, `time` (milliseconds since 1970, for charts) and the metrics by name.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from ncfm_core.progress import Progress
from worker.records import StageResult

HISTORY_FILE = "history.jsonl"
GRIDS_FOLDER = "grids"


@dataclass(frozen=True, slots=True)
class Picture:
    """The synthetic images as they are at a step."""

    step: int
    png: bytes

    @property
    def name(self) -> str:
        return f"{GRIDS_FOLDER}/{self.step:08d}.png"


@dataclass(frozen=True, slots=True)
class Notice:
    """One line for a person."""

    message: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that is wrong for as long as it lasts."""

    topic: str
    """What it concerns, such as `storage`; one trouble for each."""
    message: str
    """One line for a person; empty once it is over."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint is stored that is further than all before it."""

    step: int


Event = Progress | Picture | Notice | Trouble | Kept
Stage = Generator[Event, None, StageResult]
Row = dict[str, float]


def row_of(progress: Progress) -> Row:
    """The row of a report, stamped with the time; what is not finite is left out, as charts cannot show it."""
    finite = {name: float(value) for name, value in progress.metrics.items() if math.isfinite(value)}
    return {"step": float(progress.completed), "time": float(round(time.time() * 1000)), **finite}


class History:
    """The rows of a stage, in order of their steps."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def add(self, progress: Progress) -> None:
        """Append a row, unless one of that step is there (a resumed stage may report its first step again)."""
        if progress.metrics and (not self.rows or self.rows[-1]["step"] < progress.completed):
            self.rows.append(row_of(progress))

    def encode(self) -> bytes:
        return b"".join(json.dumps(row).encode() + b"\n" for row in self.rows)


def read_history(data: bytes) -> History:
    return History(json.loads(line) for line in data.splitlines() if line)


def picture_step(name: str) -> int | None:
    """The step of a file of a result if it is a picture."""
    folder, _, file = name.rpartition("/")
    return int(file.removesuffix(".png")) if folder == GRIDS_FOLDER and file.endswith(".png") else None
