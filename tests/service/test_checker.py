"""The checker of the tests of faults finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from service.jobs import Job, State
from service.store import IdempotencyKey
from service.tables import attempts, events, jobs
from tests.faults.checker import ClientLog, Violation, check
from tests.service.world import DOCUMENT, World
from worker.records import StageResult, now


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.close()


def succeeded(world: World) -> Job:
    job = world.running()
    world.cluster.end(f"{job.id}-1")
    world.rounds(job, n=3)
    world.driver(job).beat()
    world.rounds(job, n=1)
    world.driver(job).succeed()
    world.cluster.end(f"{job.id}-2", "SUCCEEDED", exit_code=0)
    return world.rounds(job, n=1)


def test_checker_when_all_is_well_counts_the_jobs(world: World) -> None:
    job, waiting = succeeded(world), world.submit()
    log = ClientLog(acknowledged={job.id: job.spec, waiting.id: None}, keys=[("k", job.id), ("k", job.id)])
    assert check(world.store, world.storage, log=log, alive=lambda _: []) == 2
    with pytest.raises(Violation, match="rule f: is still queued"):
        check(world.store, world.storage, all_ended=True)


def run(world: World, statement: object) -> None:
    with world.store.writing() as connection:
        connection.execute(statement)  # type: ignore[call-overload]


def forget_attempt(world: World, job: Job) -> None:
    run(world, delete(attempts).where(attempts.c.number == 1))


def forget_event(world: World, job: Job) -> None:
    run(world, delete(events).where(events.c.seq == 3))


def jump(world: World, job: Job) -> None:
    run(world, update(jobs).values(state="failed"))


def go_on(world: World, job: Job) -> None:
    world.store.note(job, "stage", {})


def overtake(world: World, job: Job) -> None:
    run(world, update(attempts).where(attempts.c.number == 1).values(fence=9))


def damage(world: World, job: Job) -> None:
    world.storage.put(job.artifacts[0].path, b"\x89PNX")


def commit(world: World, job: Job, *, key: str = "sha256:aa", path: str = "results/aa.json", attempt: int = 2) -> None:
    """As if an attempt had made its set the result of a key."""
    result = StageResult(
        key=key,
        stage="publish",
        built_by=f"{job.id}-{attempt}",
        created_at=now(),
        files=job.artifacts,
        figures={},
        seconds=1.0,
        environment={},
    )
    world.storage.put_record(path, result)


def commit_under_another_key(world: World, job: Job) -> None:
    commit(world, job, path="results/bb.json")


def commit_twice(world: World, job: Job) -> None:
    commit(world, job)
    commit(world, job, key="sha256:bb", path="results/bb.json")


def commit_of_others(world: World, job: Job) -> None:
    commit(world, job, attempt=1)


def commit_of_nobody(world: World, job: Job) -> None:
    commit(world, job, attempt=3)


def commit_and_damage(world: World, job: Job) -> None:
    commit(world, job)
    damage(world, job)


def promote_another(world: World, job: Job) -> None:
    world.driver(job).succeed({"distilled/other.png": b"\x89PNG"})


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (forget_attempt, r"rule d: 2 attempts have the rows \[2\]"),
        (forget_event, "rule c: its events are numbered"),
        (jump, "rule c: it is failed, and its events end with succeeded"),
        (go_on, r"rule c: event \d+ \(stage\) follows its end"),
        (overtake, r"rule d: an older controller began a later attempt: fences \[9, 0\]"),
        (damage, "rule g: distilled/preview.png is damaged"),
        (commit_under_another_key, "rule d: results/bb.json is the result of sha256:aa"),
        (commit_twice, r"rule d: objects/.* belongs to results/aa.json and to results/bb.json"),
        (commit_of_others, "rule d: results/aa.json names objects/.*, which another attempt wrote"),
        (commit_of_nobody, "rule d: results/aa.json was built by attempt 3, which it never had"),
        (commit_and_damage, "rule d: results/aa.json: .*a committed file is damaged"),
        (promote_another, "rule d: its set is not the one that its last attempt left"),
    ],
)
def test_checker_when_something_is_wrong_names_it(
    world: World, harm: Callable[[World, Job], None], complaint: str
) -> None:
    job = succeeded(world)
    assert job.state is State.SUCCEEDED
    harm(world, job)
    with pytest.raises(Violation, match=complaint):
        check(world.store, world.storage)


def test_checker_when_mlflow_has_it_otherwise_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = succeeded(world)
    run(world, update(jobs).values(publication="done"))
    runs: list[tuple[str, str]] = []

    def all_runs(_: str) -> list[dict[str, Any]]:
        tags = [{"key": "ncfm.job_id", "value": job.id}]
        return [{"info": {"run_id": name, "status": status}, "data": {"tags": tags}} for name, status in runs]

    monkeypatch.setattr("tests.faults.checker._all_runs", all_runs)
    for found, complaint in (
        ([], "rule g: it is published as run run-1, MLflow has {}"),
        ([("run-1", "RUNNING")], "rule g: it is succeeded, and its run RUNNING"),
        ([("run-1", "KILLED")], "rule g: it is succeeded, and its run KILLED"),
        ([("run-1", "FINISHED"), ("run-2", "RUNNING")], "one has not"),
    ):
        runs[:] = found
        with pytest.raises(Violation, match=complaint):
            check(world.store, world.storage, mlflow="http://mlflow")
    runs[:] = [("run-1", "FINISHED")]
    assert check(world.store, world.storage, mlflow="http://mlflow") == 1
    # What waits to be published may still run.
    runs.clear()
    run(world, update(jobs).values(publication="pending"))
    assert check(world.store, world.storage, mlflow="http://mlflow") == 1


def test_checker_when_clients_were_told_otherwise_says_so(world: World) -> None:
    job = succeeded(world)
    with pytest.raises(Violation, match="rule a: was acknowledged and is lost"):
        check(world.store, world.storage, log=ClientLog(acknowledged={"gone": None}))
    with pytest.raises(Violation, match="rule a: its spec"):
        check(world.store, world.storage, log=ClientLog(acknowledged={job.id: DOCUMENT}))
    with pytest.raises(Violation, match="rule b: key k was also answered with"):
        check(world.store, world.storage, log=ClientLog(keys=[("k", job.id), ("k", "other")]))
    key = IdempotencyKey(owner="local", operation="POST /jobs", key="k2", fingerprint="f")
    world.store.add_once(job.model_copy(update={"id": "another", "attempt": 0, "state": State.QUEUED}), key)
    with pytest.raises(Violation, match="rule b: key k2 was answered with"):
        check(world.store, world.storage, log=ClientLog(keys=[("k2", job.id)]))
    with pytest.raises(Violation, match=r"rule e: it has ended, and \[4711\] still live"):
        check(world.store, world.storage, alive=lambda _: [4711])
