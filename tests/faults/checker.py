"""What must hold of a service's database and storage root whatever was killed, cut off or full: Jepsen in small.

a  every acknowledged job exists, with the spec that was answered
b  one job for each idempotency key
c  a job's events are a path of the legal table, gapless, its end the last move, and the job and its stages stand where they say
d  one attempt for each submission: numbered without gaps, begun once, ended once, by no older controller than the one before;
   one result for each content key, whole, of one attempt that the database knows; a job's set is what its last attempt left
e  nothing lives of a job that has ended; one that was cancelled after it was handed to Ray says what was checked
f  every job has ended (where that is asked)
g  database, storage root and MLflow agree: the files of a set are there with the sums that the job names, and the run of a job
   whose publication is done has ended as the job has
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import JsonValue
from sqlalchemy import select

from ncfm_core.errors import DamagedError
from service.jobs import MOVES, Event, Job, State
from service.store import Store
from service.tables import idempotency, jobs
from worker.records import AttemptResult, StageResult, attempt_path, result_path, spec_path
from worker.storage import Storage

AFTER_THE_END = frozenset({"published", "changed"})
"""Events that may follow the end of a job."""
OUTCOMES = {"lost": "recovering"} | {state.value: state.value for state in State if state.is_terminal}
"""The state that an attempt's outcome belongs to."""
RUN_STATUS = {State.SUCCEEDED: "FINISHED", State.FAILED: "FAILED", State.CANCELLED: "KILLED"}
"""What MLflow says of a run, by the end of its job."""
MLFLOW_BACK_S = 60.0
"""A server that was killed answers again by then."""


class Violation(AssertionError):
    """Something that must hold does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLog:
    """What clients were told: nothing of it may be lost."""

    acknowledged: Mapping[str, dict[str, JsonValue] | None] = field(default_factory=dict)
    """Job ids that were answered with 201, with the spec of the answer where it is known."""
    keys: Iterable[tuple[str, str]] = ()
    """Every answer's idempotency key and job id."""


def check(
    store: Store,
    storage: Storage,
    *,
    mlflow: str = "",
    log: ClientLog | None = None,
    alive: Callable[[str], Iterable[object]] | None = None,
    all_ended: bool = False,
    ignore: Iterable[str] = (),
) -> int:
    """Check all jobs; how many there were.

    Args:
        store: the database, at rest or not.
        storage: the storage root.
        mlflow: URL of the MLflow server; empty where there is none.
        log: what clients were told.
        alive: processes of a job that live now.
        all_ended: whether every job must have ended.
        ignore: ids of jobs whose stored files a test has damaged on purpose.

    Raises:
        Violation: it names the job, the rule and what was found.
    """
    found, damaged = _all_jobs(store), set(ignore)
    _check_log(store, found, log or ClientLog())
    _check_results(storage, found, damaged)
    # Read after the jobs: whatever is published by now stays so.
    runs = _runs(mlflow) if mlflow else None
    for job in found.values():
        _check_events(job, store.events(job.id, after=0, limit=100_000))
        _check_attempts(job, store)
        if alive is not None and job.state.is_terminal:
            _require(not (left := list(alive(job.id))), job, "e", f"it has ended, and {left} still live")
        if all_ended:
            _require(job.state.is_terminal, job, "f", f"is still {job.state}: {job.message}")
            _require(job.publication != "pending", job, "f", f"is not published after {job.publish_tries} tries")
        if job.id not in damaged:
            _check_storage(job, storage)
        if runs is not None and job.state.is_terminal and job.publication == "done":
            _check_run(job, runs.get(job.id, {}))
    return len(found)


def _all_jobs(store: Store) -> dict[str, Job]:
    with store.reading() as connection:
        ids = [str(row.id) for row in connection.execute(select(jobs.c.id))]
    found = [store.get(job_id, deleted=True) for job_id in ids]
    return {job.id: job for job in found if job is not None}


def _require(holds: object, job: Job | str, rule: str, what: str) -> None:
    if not holds:
        raise Violation(f"job {job if isinstance(job, str) else job.id}, rule {rule}: {what}")


def _check_log(store: Store, found: Mapping[str, Job], log: ClientLog) -> None:
    for job_id, spec in log.acknowledged.items():
        _require(job_id in found, job_id, "a", "was acknowledged and is lost")
        _require(spec is None or found[job_id].spec == spec, job_id, "a", "its spec is not the one that was answered")
    told: dict[str, str] = {}
    for key, job_id in log.keys:
        first = told.setdefault(key, job_id)
        _require(first == job_id, job_id, "b", f"key {key} was also answered with job {first}")
    with store.reading() as connection:
        for row in connection.execute(select(idempotency)):
            _require(row.job_id in found, row.job_id, "b", f"key {row.key} names a job that does not exist")
            told_id = told.get(row.key, row.job_id)
            _require(told_id == row.job_id, row.job_id, "b", f"key {row.key} was answered with {told_id}")


def _check_events(job: Job, events: list[Event]) -> None:
    numbers = [event.seq for event in events]
    _require(numbers == list(range(1, len(events) + 1)), job, "c", f"its events are numbered {numbers}")
    _require(events and events[0].type == "created", job, "c", "its first event is not its creation")
    _require(job.event_seq == len(events), job, "c", f"it counts {job.event_seq} events and has {len(events)}")
    state, stages = State.QUEUED, dict[str, JsonValue]()
    for event in events:
        if isinstance(told := event.data.get("stages"), dict):
            stages |= told
        if state.is_terminal:
            _require(event.type in AFTER_THE_END, job, "c", f"event {event.seq} ({event.type}) follows its end")
        if event.type != "state":
            continue
        came, to = State(str(event.data["from"])), State(str(event.data["to"]))
        _require(came is state, job, "c", f"event {event.seq} leaves {came}, but it was {state}")
        _require(to in MOVES[state], job, "c", f"event {event.seq} moves it from {state} to {to}")
        is_asked = to is not State.CANCELLED or came is State.QUEUED
        _require(is_asked or "cleanup" in event.data, job, "e", f"event {event.seq} does not say what was checked")
        state = to
    untold = {name: stands for name, stands in job.stages.items() if stages.get(name) != stands}
    _require(not untold, job, "c", f"no event tells that its stages are {untold}")
    _require(job.state is state, job, "c", f"it is {job.state}, and its events end with {state}")
    _require((job.finished_at is not None) == state.is_terminal, job, "c", f"finished_at is {job.finished_at}")
    starts = [int(str(event.data["attempt"])) for event in events if event.data.get("to") == "starting"]
    _require(starts == list(range(1, job.attempt + 1)), job, "d", f"it has {job.attempt} attempts, and began {starts}")


def _check_attempts(job: Job, store: Store) -> None:
    rows = store.attempts(job.id)
    numbers = [row.number for row in rows]
    _require(numbers == list(range(1, job.attempt + 1)), job, "d", f"{job.attempt} attempts have the rows {numbers}")
    fences = [row.fence for row in rows]
    _require(fences == sorted(fences), job, "d", f"an older controller began a later attempt: fences {fences}")
    for row in rows:
        is_current = row.number == job.attempt and job.state in (State.STARTING, State.RUNNING, State.CANCELLING)
        if job.state is State.CANCELLING and row.outcome == "lost":
            # It was lost before its end was asked for.
            continue
        _require((row.ended_at is None) == is_current, job, "d", f"attempt {row.number} ended at {row.ended_at}")
        _require(row.outcome is None or row.outcome in OUTCOMES, job, "d", f"attempt {row.number} is {row.outcome}")
    if job.state.is_terminal and rows and rows[-1].outcome != "lost":
        _require(rows[-1].outcome == job.state, job, "d", f"it is {job.state}, its last attempt {rows[-1].outcome}")


def _check_results(storage: Storage, found: Mapping[str, Job], damaged: Collection[str]) -> None:
    owners: dict[str, str] = {}
    for path in storage.list("results"):
        result = storage.get_record(path, StageResult)
        assert result is not None
        job_id, _, attempt = result.built_by.rpartition("-")
        if job_id in damaged:
            continue
        _require(path == result_path(result.key), job_id, "d", f"{path} is the result of {result.key}")
        is_known = job_id not in found or 1 <= int(attempt) <= found[job_id].attempt
        _require(is_known, job_id, "d", f"{path} was built by attempt {attempt}, which it never had")
        for file in result.files:
            is_own = file.path.startswith(f"objects/{result.built_by}/")
            _require(is_own, job_id, "d", f"{path} names {file.path}, which another attempt wrote")
            owner = owners.setdefault(file.path, path)
            _require(owner == path, job_id, "d", f"{file.path} belongs to {owner} and to {path}")
            try:
                storage.read_file(file)
            except DamagedError as error:
                raise Violation(f"job {job_id}, rule d: {path}: {error}") from error


def _check_storage(job: Job, storage: Storage) -> None:
    if job.state is State.RUNNING or job.state is State.SUCCEEDED:
        _require(storage.size(spec_path(job.id)) is not None, job, "g", "its spec is not in the storage root")
    if job.state is not State.SUCCEEDED:
        _require(not job.artifacts, job, "g", f"it is {job.state} and has artifacts")
        return
    result = storage.get_record(attempt_path(job.id, job.attempt, "result.json"), AttemptResult)
    _require(result is not None and result.outcome == "succeeded", job, "g", f"its last attempt left {result}")
    _require(job.artifacts, job, "g", "it succeeded without a set")
    assert result is not None
    _require(job.artifacts == result.artifacts, job, "d", "its set is not the one that its last attempt left")
    folders = {file.path.removesuffix(f"/{file.name}") for file in job.artifacts}
    stages = Counter(folder.rpartition("/")[2].partition("-")[0] for folder in folders)
    _require(set(stages.values()) == {1}, job, "d", f"its set is of several results of one stage: {sorted(folders)}")
    for artifact in job.artifacts:
        data = storage.get(artifact.path)
        _require(data is not None, job, "g", f"{artifact.name} is missing")
        assert data is not None
        _require(len(data) == artifact.size, job, "g", f"{artifact.name} has {len(data)} bytes, not {artifact.size}")
        _require(hashlib.sha256(data).hexdigest() == artifact.sha256, job, "g", f"{artifact.name} is damaged")


def _runs(mlflow: str) -> dict[str, dict[str, str]]:
    """The status of each run that is not deleted by its id, for each job."""
    found: dict[str, dict[str, str]] = {}
    for run in _all_runs(f"{mlflow}/api/2.0/mlflow"):
        tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
        job_id = tags.get("ncfm.job_id") or tags.get("ncfm.search_of", "")
        found.setdefault(job_id, {})[run["info"]["run_id"]] = run["info"]["status"]
    return found


def _all_runs(api: str) -> Iterator[dict[str, Any]]:
    with httpx.Client(timeout=30, trust_env=False) as http:
        searched = _ask(http, f"{api}/experiments/search", {"max_results": 1000})
        query = {"experiment_ids": [each["experiment_id"] for each in searched["experiments"]], "max_results": 1000}
        while True:
            page = _ask(http, f"{api}/runs/search", query)
            yield from page.get("runs", [])
            if not page.get("next_page_token"):
                return
            query["page_token"] = page["next_page_token"]


def _ask(http: httpx.Client, url: str, query: Mapping[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + MLFLOW_BACK_S
    while True:
        try:
            answer: dict[str, Any] = http.post(url, json=query).raise_for_status().json()
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return answer


def _check_run(job: Job, runs: Mapping[str, str]) -> None:
    # One that was lost or stopped as its run was made may not know it: then it is enough that none is open.
    if job.mlflow_run_id is not None or job.state is State.SUCCEEDED:
        _require(job.mlflow_run_id in runs, job, "g", f"it is published as run {job.mlflow_run_id}, MLflow has {runs}")
        status = runs[str(job.mlflow_run_id)]
        _require(status == RUN_STATUS[job.state], job, "g", f"it is {job.state}, and its run {status}")
    _require("RUNNING" not in runs.values(), job, "g", f"it has ended, and of its runs {runs} one has not")
