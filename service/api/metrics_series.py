"""Route: the metrics of a job as series, downsampled here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Query

from service.api.context import JobDep, StorageDep
from service.api.faults import METRIC
from service.api.models import Body
from service.api.openapi import problems
from service.jobs import Job
from worker.records import CheckpointRecord, FileRecord, StageResult, attempt_path, result_path
from worker.storage import Storage

router = APIRouter(tags=["jobs"])

HISTORY = "history.jsonl"
MAX_BYTES = 32 << 20
"""Of one history: a longer one is not a history of ours."""
MAX_HISTORIES = 200

Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """The rows of one stage result, or of one in the making."""

    stage: str
    result: str
    """Beginning of its content key."""
    is_complete: bool
    rows: Sequence[Row]


class Point(Body):
    step: float
    time: float | None
    """Milliseconds since 1970."""
    value: float


class Series(Body):
    """One metric of one stage result."""

    key: str
    stage: str
    result: str
    """Beginning of the result's content key."""
    complete: bool
    """False for a result in the making: there is more to come."""
    total: int
    """Points before they were thinned out."""
    points: list[Point]


class MetricsBody(Body):
    """What the stages of a job have reported."""

    keys: list[str]
    """All metrics that there are."""
    series: list[Series]
    stages: dict[str, str]
    """Stage to `complete`, `partial` or `pending`."""


@router.get("/jobs/{id}/metrics", responses=problems(404, 422, 503), summary="Metrics")
def get_metrics(
    job: JobDep,
    storage: StorageDep,
    key: Annotated[
        list[Annotated[str, Query(pattern=METRIC)]] | None,
        Query(max_length=50, description="Names of metrics, such as `loss`; all by default."),
    ] = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Of one series.")] = 500,
) -> MetricsBody:
    """What the stages have reported, as far as it is stored.

    A stage that has ended is complete; one that runs is there up to its last checkpoint. Each bucket of a series that is too long
    keeps its least and its greatest value; the first and the last point are always kept.
    """
    histories = list(read_histories(job, storage))
    names = sorted({name for history in histories for row in history.rows for name in row} - {"step", "time"})
    shown = names if key is None else [name for name in names if name in set(key)]
    return MetricsBody(
        keys=names,
        series=[
            _series(history, name, max_points)
            for history in histories
            for name in shown
            if any(name in row for row in history.rows)
        ],
        stages={stage: _standing(stage, state, histories) for stage, state in job.stages.items()},
    )


def read_histories(job: Job, storage: Storage) -> Iterator[History]:
    """All that is stored: results that the job's attempts named or made, and checkpoints of what it is making."""
    seen: set[str] = set()
    for result in _named(job, storage):
        key = result.key.removeprefix("sha256:")[:12]
        record = next((file for file in result.files if file.name == HISTORY), None)
        if key in seen or record is None or len(seen) >= MAX_HISTORIES:
            continue
        seen.add(key)
        yield History(result.stage, key, True, _rows(storage.get(record.path) or b""))
    for attempt in range(job.attempt, 0, -1):
        for path in storage.list(f"objects/{job.id}-{attempt}"):
            folder = PurePosixPath(path).parent.name
            stage, key = [*folder.split("-"), ""][:2]
            if PurePosixPath(path).name == HISTORY and key not in seen and len(seen) < MAX_HISTORIES:
                seen.add(key)
                yield History(stage, key, True, _rows(storage.get(path) or b""))
    if not job.state.is_terminal:
        yield from _unfinished(job, storage, seen)


def _named(job: Job, storage: Storage) -> Iterator[StageResult]:
    """The results that the last attempt's last word names: those that it found, too."""
    try:
        word = json.loads(storage.get(attempt_path(job.id, job.attempt, "result.json")) or b"{}")
    except ValueError:
        return
    keys = word.get("keys") if isinstance(word, dict) else None
    for key in keys if isinstance(keys, list) else ():
        result = storage.get_record(result_path(str(key)), StageResult)
        if result is not None:
            yield result


def _unfinished(job: Job, storage: Storage, seen: set[str]) -> Iterator[History]:
    """The newest checkpoint of each result in the making: its history stands in the header of its file."""
    newest: dict[str, tuple[int, str]] = {}
    for path in storage.list(f"checkpoints/{job.id}"):
        parts = PurePosixPath(path).parts
        if len(parts) == 5 and path.endswith(".json") and PurePosixPath(path).stem.isdigit():
            newest[parts[2]] = max(newest.get(parts[2], (-1, "")), (int(PurePosixPath(path).stem), path))
    for key, (_, path) in newest.items():
        if key[:12] in seen or len(seen) >= MAX_HISTORIES:
            continue
        record = storage.get_record(path, CheckpointRecord)
        rows = _rows(_header_history(storage, record.file)) if record is not None else []
        if rows:
            seen.add(key[:12])
            stage = job.progress.stage if job.progress is not None and job.progress.stage else "running"
            yield History(stage, key[:12], False, rows)


def _header_history(storage: Storage, file: FileRecord) -> bytes:
    """The history in the header of a safetensors file (`worker.checkpoints`), without its tensors."""
    length = int.from_bytes(b"".join(storage.stream(file.path, start=0, end=8)), "little")
    if not 0 < length <= min(MAX_BYTES, file.size):
        return b""
    try:
        header = json.loads(b"".join(storage.stream(file.path, start=8, end=8 + length)))
        return str(header["__metadata__"]["history"]).encode()
    except (ValueError, KeyError, TypeError):
        return b""


def _rows(data: bytes) -> list[Row]:
    """The rows of a history; what is no row is passed over."""
    rows: list[Row] = []
    for line in data[:MAX_BYTES].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append({str(name): float(value) for name, value in row.items() if _is_number(value)})
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _series(history: History, name: str, max_points: int) -> Series:
    points = [Point(step=row["step"], time=row.get("time"), value=row[name]) for row in history.rows if name in row]
    kept = downsample(points, max_points)
    return Series(
        key=name,
        stage=history.stage,
        result=history.result,
        complete=history.is_complete,
        total=len(points),
        points=kept,
    )


def downsample(points: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points`, in order: the first, the last, and of each bucket between them the least and the greatest.

    Args:
        points: in the order of their steps.
        max_points: at least 2.
    """
    if len(points) <= max_points:
        return list(points)
    inner, buckets = points[1:-1], (max_points - 2) // 2
    kept = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        kept.extend(_extremes(bucket))
    return [*kept, points[-1]]


def _extremes(bucket: Sequence[Point]) -> Iterable[Point]:
    places = range(len(bucket))
    least = min(places, key=lambda place: bucket[place].value)
    greatest = max(places, key=lambda place: bucket[place].value)
    return [bucket[place] for place in sorted({least, greatest})]


def _standing(stage: str, state: str, histories: Sequence[History]) -> str:
    """Whether all that a stage will have reported is here."""
    if state in ("done", "cached", "skipped"):
        return "complete"
    is_begun = any(history.stage == stage for history in histories)
    return "partial" if is_begun or state == "running" else "pending"
