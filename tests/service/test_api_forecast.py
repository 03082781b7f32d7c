"""Trying a submission, capabilities, and the cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from starlette.testclient import TestClient

from ncfm_core.cost import STAGE_SECONDS, START_SECONDS, costs, rate
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from service.api import create_app
from service.jobs import State
from service.settings import Settings
from service.store import Sighting, Store
from service.tables import uploads
from service.uploads import Upload
from worker.plan import plan
from worker.records import StageResult, attempt_path, now, result_path
from worker.storage import Storage

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}
DIGEST = "sha256:" + "d" * 64


@pytest.fixture
def fresh(tmp_path: Path, database_url: str) -> Iterator[TestClient]:
    """An API without jobs, on each engine."""
    app = create_app(Settings(home=tmp_path, database_url=database_url))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def store_of(client: TestClient) -> Store:
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    return store


def storage_of(client: TestClient) -> Storage:
    storage: Storage = client.app.state.storage  # type: ignore[attr-defined]
    return storage


def validate(client: TestClient, document: Any = SMALLEST) -> dict[str, Any]:
    reply = client.post("/jobs/validate", json=document)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def succeeded(client: TestClient, document: Any = SMALLEST, **facts: Any) -> str:
    """A job that has told the digest of its data."""
    store = store_of(client)
    job = store.get(client.post("/jobs", json=document).json()["id"])
    for state in (State.STARTING, State.RUNNING, State.SUCCEEDED):
        assert job is not None
        job = store.move(job, state, attempt=1)
    assert job is not None
    word = {"data": {"digest": DIGEST, "held_out_digest": None} | facts}
    storage_of(client).put(attempt_path(job.id, 1, "result.json"), json.dumps(word).encode())
    return job.id


def commit(storage: Storage, key: str) -> None:
    """A stored result, so far as the name goes."""
    result = StageResult(
        key=key, stage="teachers", built_by="x-1", created_at=now(), files=(), figures={}, seconds=1.0, environment={}
    )
    storage.create_record(result_path(key), result)


def test_validate_resolves_and_keeps_nothing(fresh: TestClient) -> None:
    body = validate(fresh, SMALLEST | {"priority": 5, "labels": {"a": "b"}})
    spec = resolve(SMALLEST)
    assert (body["spec"], body["digest"], body["warnings"]) == (spec.document(), spec.digest(), [])
    assert {stage["stage"] for stage in body["stages"]} == {"inspect", "teachers", "distill", "evaluate", "publish"}
    unknown = [stage for stage in body["stages"] if stage["stage"] != "inspect"]
    assert {(stage["state"], stage["key"]) for stage in unknown} == {("unknown", None)}
    assert all("until inspected" in stage["why"] for stage in unknown)
    assert fresh.get("/jobs").json()["items"] == []


def test_validate_when_the_data_are_known_says_what_is_cached(fresh: TestClient) -> None:
    told_by = succeeded(fresh)
    spec: JobSpec = resolve(SMALLEST)
    builds = list(plan(spec, DIGEST).builds())
    for build in builds[:2]:
        commit(storage_of(fresh), str(build.key))
    stages = validate(fresh, SMALLEST | {"ipc": 1})["stages"]
    assert told_by in stages[0]["why"]
    assert [stage["key"] for stage in stages[1:]] == [build.key for build in builds]
    assert [stage["state"] for stage in stages[1:]] == ["cached"] * 2 + ["missing"] * (len(builds) - 2)
    other = validate(fresh, {"dataset": "cifar10", "ipc": 1, "preset": "quick"})["stages"]
    assert {stage["state"] for stage in other[1:]} == {"unknown"}


def test_validate_when_searched_knows_the_keys_before_the_search(fresh: TestClient) -> None:
    document = SMALLEST | {"search": {"trials": 2, "space": {"image_lr": [0.01, 0.02]}}}
    succeeded(fresh, document, held_out_digest="sha256:" + "e" * 64)
    stages = {stage["stage"]: stage for stage in validate(fresh, document)["stages"]}
    assert (stages["search"]["state"], stages["teachers"]["state"]) == ("missing", "missing")
    assert (stages["distill"]["state"], "until searched" in stages["distill"]["why"]) == ("unknown", True)


def test_validate_estimates_where_it_can_and_says_why_where_not(fresh: TestClient) -> None:
    estimate = validate(fresh)["estimate"]
    assert (estimate["available"], "no cluster" in estimate["reason"]) == (False, True)
    store_of(fresh).see(Sighting(cpus=2, gpus=0, seen_at=now(), checked_at=now()))
    estimate = validate(fresh)["estimate"]
    assert estimate["available"] and estimate["seconds"] > 0 and "2 CPU" in estimate["basis"]
    folder = {"dataset": {"name": "imagefolder", "uri": "/data/birds", "image_size": 32}, "ipc": 1}
    assert not validate(fresh, folder)["estimate"]["available"]
    succeeded(fresh)
    for build in plan(resolve(SMALLEST), DIGEST).builds():
        commit(storage_of(fresh), str(build.key))
    estimate = validate(fresh)["estimate"]
    assert (estimate["seconds"], "stored already" in estimate["text"]) == (START_SECONDS, True)


def test_estimate_of_a_job_of_seconds_has_its_start_in_it(fresh: TestClient) -> None:
    """The demo's job has five seconds of operations and takes 32 to 34 s (docs/performance.md)."""
    store_of(fresh).see(Sighting(cpus=2, gpus=0, seen_at=now(), checked_at=now()))
    estimate = validate(fresh)["estimate"]
    assert 33 / 3 < estimate["seconds"] < 33 * 3
    assert "24 s for starting" in estimate["basis"]
    tiny = SMALLEST | {"method": {"steps": 10}, "teachers": {"count": 1}, "evaluate": [{"students": 1}]}
    assert 15 < validate(fresh, tiny)["estimate"]["seconds"] < estimate["seconds"]


def test_estimate_leaves_out_what_is_stored(fresh: TestClient) -> None:
    store_of(fresh).see(Sighting(cpus=2, gpus=0, seen_at=now(), checked_at=now()))
    document: dict[str, Any] = {"dataset": "cifar10", "ipc": 10, "preset": "quick"}
    whole = validate(fresh, document)["estimate"]
    assert "stored" not in whole["basis"]
    succeeded(fresh, document)
    spec = resolve(document)
    needed, each = plan(spec, DIGEST), costs(spec)
    for build in needed.teachers:
        commit(storage_of(fresh), str(build.key))
    rest = validate(fresh, document)["estimate"]
    saved = len(needed.teachers) * each.teacher / rate(spec, cpus=2, gpus=0) + STAGE_SECONDS
    assert rest["seconds"] == pytest.approx(whole["seconds"] - saved, abs=0.2)
    assert "without those of 3 stored results" in rest["basis"]
    commit(storage_of(fresh), str(needed.distill.key))
    assert validate(fresh, document)["estimate"]["seconds"] < rest["seconds"]


def test_estimate_of_an_upload_rests_on_what_was_counted(fresh: TestClient) -> None:
    store_of(fresh).see(Sighting(cpus=2, gpus=0, seen_at=now(), checked_at=now()))
    estimates = []
    for number, train in enumerate((50, 5000)):
        upload = Upload(
            id=f"{number}" * 64,
            owner="local",
            name="birds",
            size=1,
            facts={"kind": "zip", "classes": {"crow": [train, 10], "owl": [train, 10]}},
            created_at=now(),
        )
        with store_of(fresh).writing() as connection:
            connection.execute(insert(uploads).values({name: getattr(upload, name) for name in uploads.c.keys()}))
        storage_of(fresh).put(upload.path, b"u")
        dataset = {"name": "imagefolder", "uri": upload.uri, "image_size": 32}
        estimates.append(validate(fresh, {"dataset": dataset, "ipc": 1, "preset": "quick"})["estimate"])
    assert all("images of the upload" in estimate["basis"] for estimate in estimates)
    assert "if the data are about" not in estimates[0]["text"]
    assert estimates[0]["seconds"] * 2 < estimates[1]["seconds"]


def test_validate_when_not_legal_names_the_field(fresh: TestClient) -> None:
    reply = fresh.post("/jobs/validate", json=SMALLEST | {"ipc": 0})
    assert (reply.status_code, reply.json()["errors"][0]["field"]) == (422, "ipc")
    reply = fresh.post("/jobs/validate", json=SMALLEST | {"priority": 101})
    assert (reply.status_code, reply.json()["errors"][0]["field"]) == (422, "priority")


def test_capabilities_name_all_that_a_spec_may_name(fresh: TestClient) -> None:
    body = fresh.get("/capabilities").json()
    digits = next(each for each in body["datasets"] if each["name"] == "digits")
    assert (digits["classes"], digits["image_size"], digits["max_ipc"], digits["presets"]) == (10, 8, 118, ["quick"])
    [method] = body["methods"]
    assert method["name"] == "ncfm"
    assert method["schema"]["properties"]["steps"]["minimum"] == 1
    assert {each["name"] for each in body["networks"]} >= {"convnet", "resnet18"}
    assert {"dc", "ncfm"} <= set(body["protocols"])
    assert body["limits"]["page_items"] == 200
    for each in body["datasets"]:
        if each["max_ipc"] is not None:
            made = {"dataset": each["name"], "ipc": each["max_ipc"] + 1, "preset": each["presets"][0]}
            assert fresh.post("/jobs/validate", json=made).status_code == 422


def test_cluster_tells_what_is_held_and_whether_it_is_stale(fresh: TestClient) -> None:
    empty = fresh.get("/cluster").json()
    assert (empty["cpus"], empty["stale"], empty["nodes"]) == (None, True, [])
    store = store_of(fresh)
    job = store.get(fresh.post("/jobs", json=SMALLEST).json()["id"])
    assert job is not None
    store.move(job, State.STARTING, attempt=1)
    store.see(Sighting(cpus=8, gpus=2, seen_at=now(), checked_at=now(), nodes=({"id": "n1"},)))
    body = fresh.get("/cluster").json()
    assert (body["cpus"], body["gpus"], body["stale"], body["nodes"]) == (8, 2, False, [{"id": "n1"}])
    assert body["held"] == {"cpus": float(job.demand.cpus), "gpus": 1.0, "jobs": 1}
    store.see(Sighting(checked_at=now(), ray_error="Ray cannot be asked"))
    assert (fresh.get("/cluster").json()["stale"], fresh.get("/cluster").json()["cpus"]) == (True, 8)
