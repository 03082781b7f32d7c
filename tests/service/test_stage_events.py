"""Whoever follows a job's events learns how its stages stand, to the last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs import Job, State
from tests.service.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.close()


def test_events_when_a_job_ends_tell_how_its_last_stages_stand(world: World) -> None:
    job = world.running()
    world.driver(job).beat(10, stages={"inspect": "done", "distill": "done", "publish": "done"})
    world.driver(job).succeed()
    ended = world.rounds(job, n=1)
    assert ended.state is State.SUCCEEDED
    events = world.store.events(job.id, after=0, limit=99)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert (events[-1].type, events[-1].data["to"]) == ("state", "succeeded")
    assert events[-1].data["stages"] == {"distill": "done", "publish": "done"}
    assert told(world, job) == ended.stages


@pytest.mark.parametrize("how", ["fails", "lost", "cancelled"])
def test_events_when_a_job_has_no_good_end_tell_how_its_stages_stood(world: World, how: str) -> None:
    job = world.running()
    world.driver(job).beat(10, stages={"inspect": "done", "distill": "done", "evaluate": "running"})
    if how == "fails":
        world.driver(job).fail("dataset_unavailable", "there is no such data")
    elif how == "lost":
        world.cluster.end(f"{job.id}-1")
    else:
        world.cancel(job)
    ended = world.rounds(job, n=1 if how == "lost" else 6)
    assert ended.stages["evaluate"] == "running"
    assert told(world, job) == ended.stages


def told(world: World, job: Job) -> dict[str, object]:
    """How a reader of the events alone knows the stages."""
    stages: dict[str, object] = {}
    for event in world.store.events(job.id, after=0, limit=999):
        found = event.data.get("stages", {})
        assert isinstance(found, dict)
        stages |= found
    return stages


def test_job_when_its_driver_ends_while_it_is_looked_at_keeps_its_last_status(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.running()
    driver, read = world.driver(job), world.storage.get_record

    def read_and_end(path: str, kind: Any) -> Any:
        found = read(path, kind)
        monkeypatch.setattr(world.storage, "get_record", read)
        driver.beat(10, stages={"inspect": "done", "distill": "done"})
        driver.succeed()
        return found

    monkeypatch.setattr(world.storage, "get_record", read_and_end)
    ended = world.rounds(job, n=2)
    assert (ended.state, ended.stages["distill"]) == (State.SUCCEEDED, "done")
