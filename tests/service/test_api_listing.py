"""Lists of jobs: summaries, filters, cursors."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service.api import create_app
from service.jobs import Job, State
from service.pulse import Pulse, pulses
from service.reports import Progress, result_of
from service.settings import Settings
from service.store import Store
from service.testing import FakeDriver
from worker.records import now
from worker.storage import Storage

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}


@pytest.fixture
def fresh(tmp_path: Path, database_url: str) -> Iterator[TestClient]:
    """An API without jobs, on each engine."""
    app = create_app(Settings(home=tmp_path, database_url=database_url))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def submit(client: httpx.Client | TestClient, **more: Any) -> str:
    reply = client.post("/jobs", json=SMALLEST | more)
    assert reply.status_code == 201, reply.text
    made: str = reply.json()["id"]
    return made


def listed(client: httpx.Client | TestClient, **params: Any) -> list[str]:
    reply = client.get("/jobs", params=params)
    assert reply.status_code == 200, reply.text
    return [item["id"] for item in reply.json()["items"]]


def test_list_has_summaries_without_the_bulk(client: httpx.Client, api_store: Store, api_storage: Storage) -> None:
    job = api_store.get(submit(client, labels={"a": "b"}, priority=3))
    assert job is not None
    for state in (State.STARTING, State.RUNNING):
        job = api_store.move(job, state, attempt=1)
        assert job is not None
    result = FakeDriver(api_storage, job).succeed()
    api_store.move(job, State.SUCCEEDED, result=result_of(result), artifacts=result.artifacts)
    [item] = client.get("/jobs", params={"state": "succeeded"}).json()["items"]
    assert set(item) == {
        "id", "state", "reason", "message", "dataset", "ipc", "method", "owner", "priority", "labels", "progress",
        "accuracy", "created_at", "started_at", "finished_at",
    }  # fmt: skip
    assert (item["dataset"], item["ipc"], item["method"], item["priority"]) == ("digits", 1, "ncfm", 3)
    assert (item["labels"], item["accuracy"]) == ({"a": "b"}, {"mean": 87.0, "std": 1.5, "n": 5})


def test_list_when_filtered_has_what_was_asked_for(fresh: TestClient) -> None:
    first = submit(fresh, labels={"paper": "dm", "x": "1"})
    second = submit(fresh, labels={"paper": "dm"}, ipc=2)
    third = submit(fresh, dataset="cifar10", preset="quick")
    assert listed(fresh, label="paper:dm") == [second, first]
    assert listed(fresh, label=["paper:dm", "x:1"]) == [first]
    assert listed(fresh, label="paper:other") == []
    assert listed(fresh, dataset="cifar10") == [third]
    assert listed(fresh, method="ncfm", order="oldest") == [first, second, third]
    assert listed(fresh, owner="local", state=["queued", "running"]) == [third, second, first]
    assert listed(fresh, owner="somebody") == []
    at = fresh.get(f"/jobs/{second}").json()["created_at"]
    assert listed(fresh, created_after=at) == [third]
    assert listed(fresh, created_before=at) == [first]
    assert listed(fresh, created_before=datetime.now(UTC).isoformat(), created_after="2020-01-01T00:00:00") == [
        third,
        second,
        first,
    ]


@pytest.mark.parametrize("order", ["newest", "oldest"])
def test_list_when_paged_in_either_order_has_each_once(fresh: TestClient, order: str) -> None:
    made = [submit(fresh, labels={"odd": str(i % 2)}) for i in range(7)]
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 2, "order": order, "label": "odd:0"}
    while True:
        page = fresh.get("/jobs", params=params).json()
        seen += [item["id"] for item in page["items"]]
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    assert seen == (made[::2] if order == "oldest" else made[::-2])


def test_list_when_the_cursor_belongs_to_other_filters_is_refused(fresh: TestClient) -> None:
    for _ in range(3):
        submit(fresh)
    cursor = fresh.get("/jobs", params={"limit": 1, "state": "queued"}).json()["next"]
    assert fresh.get("/jobs", params={"limit": 2, "state": "queued", "cursor": cursor}).status_code == 200
    for other in ({}, {"state": "failed"}, {"state": "queued", "order": "oldest"}):
        reply = fresh.get("/jobs", params={"limit": 1, "cursor": cursor} | other)
        assert reply.status_code == 422
        assert reply.json()["errors"][0]["field"] == "cursor"
        assert "other filters" in reply.json()["detail"]


def test_pulses_tell_where_jobs_stand(database_url: str) -> None:
    store = Store(database_url)
    job = store.add(Job(id="a", requested={}, spec={}, created_at=now()))
    progress = Progress(stage="distill", completed=1, total=2, unit="step", updated_at=now())
    store.report(job, progress=progress)
    found = pulses(store, ["a", "b", *map(str, range(1200))])
    assert found == {"a": Pulse(State.QUEUED, job.version, job.event_seq, 0, progress)}
    store.note(job, "changed", {}, deleted_at=now())
    assert pulses(store, ["a"]) == {}
    store.close()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("label=paper", "label"),
        ("label=A:b", "label"),
        ("label=a:b&label=a:c", "label"),
        ("created_after=yesterday", "created_after"),
        ("created_after=0001-01-01T00:00:00%2B14:00", "created_after"),
        ("created_before=9999-12-31T23:59:59-14:00", "created_before"),
        ("created_before=0.5", "created_before"),
        ("created_before=20260101", "created_before"),
        ("order=random", "order"),
        ("owner=%00", "owner"),
        ("dataset=" + "x" * 200, "dataset"),
    ],
)
def test_list_when_a_filter_is_not_legal_names_it(client: httpx.Client, query: str, field: str) -> None:
    reply = client.get(f"/jobs?{query}")
    assert reply.status_code == 422, reply.text
    assert reply.json()["errors"][0]["field"] == field
