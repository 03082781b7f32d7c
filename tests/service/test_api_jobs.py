from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from service.api.advice import awaited_by_new
from service.jobs import Job, Reason, State
from service.reports import Progress, result_of
from service.store import Sighting, Store
from service.testing import FakeDriver
from tests.service.world import move as move_job
from worker.records import attempt_path, now
from worker.storage import Storage

SMALLEST: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1}


def submit(client: httpx.Client, document: Any = SMALLEST) -> dict[str, Any]:
    reply = client.post("/jobs", json=document)
    assert reply.status_code == 201, reply.text
    body: dict[str, Any] = reply.json()
    return body


def stored(store: Store, body: dict[str, Any]) -> Job:
    job = store.get(body["id"])
    assert job is not None
    return job


def move(store: Store, body: dict[str, Any], *states: State, **changes: object) -> Job:
    return move_job(store, body["id"], *states, **changes)


def test_submit_when_smallest_answers_with_the_whole_job(client: httpx.Client) -> None:
    reply = client.post("/jobs", json=SMALLEST)
    body = reply.json()
    assert reply.status_code == 201
    assert reply.headers["Location"] == f"/jobs/{body['id']}"
    assert reply.headers["X-Request-ID"]
    assert {
        "id", "state", "reason", "spec", "requested", "warnings", "progress", "result", "error", "created_at", "started_at",
        "finished_at", "links",
    } <= set(body)  # fmt: skip
    assert (body["state"], body["reason"]) == ("queued", "waiting_for_cluster")
    assert body["message"] == body["queue"]["message"] == awaited_by_new(None)
    assert body["requested"] == SMALLEST
    assert body["spec"] == resolve(SMALLEST).document()
    assert body["warnings"] == []
    assert datetime.fromisoformat(body["created_at"]).tzinfo is not None
    for name in ("progress", "result", "error", "started_at", "finished_at"):
        assert body[name] is None
    for name in ("self", "events", "logs", "artifacts"):
        assert client.get(body["links"][name]).status_code == 200
    assert client.get(reply.headers["Location"]).json() == body


def test_submit_when_the_spec_is_resolved_gives_the_same_spec(client: httpx.Client) -> None:
    spec = submit(client, {"dataset": "cifar10", "ipc": 10, "preset": "quick", "seed": 3})["spec"]
    assert submit(client, spec)["spec"] == spec


def test_submit_when_it_would_take_days_warns_and_names_the_way_out(client: httpx.Client, api_store: Store) -> None:
    paper = {"dataset": "cifar10", "ipc": 10}
    [unseen] = submit(client, paper)["warnings"]
    assert "CPUs are assumed" in unseen
    api_store.see(Sighting(cpus=2, gpus=0, checked_at=now()))
    [warning] = submit(client, paper)["warnings"]
    assert "days on 2 CPU cores" in warning
    assert "preset: quick" in warning
    assert submit(client)["warnings"] == []


def test_submit_when_pools_leave_out_rows_warns_and_names_the_sizes_that_lose_nothing(client: httpx.Client) -> None:
    dataset = {"name": "imagefolder", "uri": "/data/birds.tar", "image_size": 30}
    evaluate = [{}, {"model": {"width": 64}}, {"model": "resnet18"}, {"model": "alexnet"}]
    body = {"dataset": dataset, "ipc": 1, "preset": "quick", "model": {"depth": 3}, "evaluate": evaluate}
    left_out = "round down and leave out rows and columns of images of 30 pixels"
    assert [each for each in submit(client, body)["warnings"] if "pools" in each] == [
        f"model: the pools of convnet-3, width 32 {left_out}; 28 or 32 pixels would lose nothing.",
        f"evaluate.1.model: the pools of convnet-3, width 64 {left_out}; 28 or 32 pixels would lose nothing.",
        f"evaluate.3.model: the pools of alexnet, width 16 {left_out}; 28 or 32 pixels would lose nothing.",
    ]
    whole = body | {"dataset": dataset | {"image_size": 32}}
    assert not [each for each in submit(client, whole)["warnings"] if "pools" in each]


def test_get_job_when_running_and_done_shows_progress_and_figures(
    client: httpx.Client, api_store: Store, api_storage: Storage
) -> None:
    body = submit(client)
    progress = Progress(stage="distill", completed=3, total=10, unit="step", job_percent=12.5, job_eta_seconds=40.0)
    job = move(api_store, body, State.STARTING, State.RUNNING, progress=progress)
    assert client.get(f"/jobs/{job.id}").json()["progress"] == {
        "stage": "distill", "completed": 3, "total": 10, "unit": "step",
        "percent": 30.0, "eta_seconds": None, "updated_at": None, "job_percent": 12.5, "job_eta_seconds": 40.0,
    }  # fmt: skip
    result = FakeDriver(api_storage, job).succeed()
    api_store.move(job, State.SUCCEEDED, result=result_of(result), mlflow_url=result.mlflow_url)
    done = client.get(f"/jobs/{job.id}").json()
    assert done["state"] == "succeeded"
    for name in ("distilled", "random_real", "full"):
        assert {"mean", "std", "n"} <= set(done["result"][name])
    assert done["links"]["mlflow"] == "http://mlflow/run-1"
    assert done["finished_at"] is not None


def test_list_when_paged_by_cursor_shows_each_job_once(client: httpx.Client) -> None:
    made = [submit(client)["id"] for _ in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params: dict[str, str | int] = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/jobs", params=params).json()
        assert set(page) == {"items", "next"}
        assert len(page["items"]) <= 2
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        submit(client)
        if cursor is None:
            break
    assert len(seen) == len(set(seen))
    assert set(made) <= set(seen)
    assert seen == sorted(seen, reverse=True)


def test_list_when_filtered_by_state(client: httpx.Client) -> None:
    body = submit(client)
    client.post(body["links"]["cancel"])
    cancelled = client.get("/jobs", params={"state": "cancelled"}).json()["items"]
    assert [item["id"] for item in cancelled] == [body["id"]]
    both = client.get("/jobs", params={"state": ["cancelled", "queued"], "limit": 200}).json()["items"]
    assert {item["state"] for item in both} == {"cancelled", "queued"}


def test_cancel_when_queued_running_and_already_cancelled(client: httpx.Client, api_store: Store) -> None:
    body = submit(client)
    reply = client.post(body["links"]["cancel"])
    assert (reply.status_code, reply.json()["state"], reply.json()["reason"]) == (202, "cancelled", "requested")
    assert client.post(body["links"]["cancel"]).status_code == 200
    running = submit(client)
    move(api_store, running, State.STARTING, State.RUNNING)
    reply = client.post(running["links"]["cancel"])
    assert (reply.status_code, reply.json()["state"]) == (202, "cancelling")
    again = client.post(running["links"]["cancel"])
    assert (again.status_code, again.json()) == (200, reply.json())


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED])
def test_cancel_when_ended_otherwise_says_what_is_legal(client: httpx.Client, api_store: Store, state: State) -> None:
    body = submit(client)
    before = move(api_store, body, State.STARTING, State.RUNNING, state)
    reply = client.post(body["links"]["cancel"])
    assert reply.status_code == 409
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem = reply.json()
    assert problem["code"] == "illegal_move"
    assert problem["errors"][0]["field"] == "state"
    assert problem["errors"][0]["value"] == f"'{state}'"
    assert f"{state} is final" in problem["detail"]
    assert stored(api_store, body) == before


def test_events_when_paged_by_after(client: httpx.Client, api_store: Store) -> None:
    body = submit(client)
    move(api_store, body, State.STARTING, State.RUNNING, State.FAILED, reason=Reason.USER_ERROR)
    events = client.get(body["links"]["events"]).json()
    assert [event["seq"] for event in events["items"]] == [1, 2, 3, 4]
    assert all(set(event) == {"seq", "at", "type", "data", "actor", "request_id"} for event in events["items"])
    assert events["next"] is None
    first = client.get(body["links"]["events"], params={"limit": 2}).json()
    assert first["next"] == 2
    rest = client.get(body["links"]["events"], params={"after": first["next"], "limit": 2}).json()
    assert [event["seq"] for event in rest["items"]] == [3, 4]
    assert rest["next"] is None


def test_logs_when_they_grow_can_be_followed(client: httpx.Client, api_store: Store, api_storage: Storage) -> None:
    body = submit(client)
    assert client.get(body["links"]["logs"]).text == ""
    job = move(api_store, body, State.STARTING)
    assert client.get(body["links"]["logs"]).text == ""
    api_storage.put(attempt_path(job.id, 1, "driver.log"), "first line\nüber\n".encode())
    reply = client.get(body["links"]["logs"])
    assert reply.text == "first line\nüber\n"
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert client.get(body["links"]["logs"], params={"after": 11}).text == "über\n"
    assert client.get(body["links"]["logs"], params={"after": 999}).text == ""
    wrong = client.get(body["links"]["logs"], params={"attempt": 2})
    assert wrong.status_code == 422
    assert wrong.json()["errors"][0]["field"] == "attempt"


def test_head_when_get_is_served_sends_headers_only(client: httpx.Client) -> None:
    body = submit(client)
    for path in ("/jobs", body["links"]["self"], "/livez", "/openapi.json"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == got.headers["Content-Length"]


def test_readyz_when_the_controller_is_silent_or_sees_trouble(client: httpx.Client, api_store: Store) -> None:
    assert client.get("/livez").json() == {"status": "ok", "checks": {}}
    long_ago = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    api_store.see(Sighting(cpus=2, gpus=0, checked_at=long_ago))
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "degraded"
    assert ready.json()["checks"]["controller"].startswith("silent since 2026-01-01")
    api_store.see(Sighting(cpus=2, gpus=0, checked_at=now(), ray_error="Ray cannot be asked"))
    assert client.get("/readyz").json()["checks"]["ray"] == "Ray cannot be asked"
    api_store.see(Sighting(cpus=2, gpus=0, checked_at=now()))
    assert client.get("/readyz").json() == {
        "status": "ok", "checks": {"database": "ok", "controller": "ok", "ray": "ok", "mlflow": "ok"}
    }  # fmt: skip


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*(references(value) for value in node.values()))
    return set().union(*(references(item) for item in node)) if isinstance(node, list) else set()


def test_openapi_when_read_documents_submission_statuses_and_problems(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["Submission"]["required"] == ["dataset", "ipc"]
    assert set(schemas["Submission"]["properties"]) == set(JobSpec.model_fields) | {"priority", "labels"}
    body = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/Submission"}
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    assert "HTTPValidationError" not in str(document)
    assert "| queued | starting, cancelled |" in document["info"]["description"]
    expected = {
        ("/jobs", "post"): {"201", "400", "403", "413", "415", "422", "500", "503", "507"},
        ("/jobs", "get"): {"200", "403", "422", "500", "503"},
        ("/jobs/{id}/cancel", "post"): {"200", "202", "400", "403", "404", "409", "422", "500", "503"},
        ("/jobs/{id}/artifacts/{path}", "get"): {"200", "206", "304", "403", "404", "410", "416", "500", "503"},
    }
    for (path, method), statuses in expected.items():
        responses = document["paths"][path][method]["responses"]
        assert statuses <= set(responses)
        for status in statuses - {"200", "201", "202", "206", "304"}:
            assert "application/problem+json" in responses[status]["content"]


def test_new_job_says_what_it_waits_for_and_the_way_out() -> None:
    at = now()
    assert "none has looked yet: start one with `ncfm controller`" in awaited_by_new(None)
    silent = Sighting(checked_at=at - timedelta(hours=1), seen_at=at)
    assert re.search("none has looked since .* start one", awaited_by_new(silent))
    away = Sighting(checked_at=at, seen_at=at, ray_error="refused")
    assert re.search("waits for Ray.*GET /cluster says why", awaited_by_new(away))
    well = Sighting(checked_at=at, seen_at=at, cpus=2, gpus=0)
    assert "the controller's next look" in awaited_by_new(well)
