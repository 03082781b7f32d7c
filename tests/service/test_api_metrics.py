"""The metrics of a job as series."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.metrics_series import Point, downsample
from service.jobs import Job, State
from service.reports import Progress
from service.store import Store
from worker.records import CheckpointRecord, FileRecord, StageResult, attempt_path, now, result_path
from worker.storage import Storage

KEY = "sha256:" + "a" * 64


def history(count: int) -> bytes:
    rows = [{"step": step, "time": 1000 * step, "loss": 1 / step, "psi gap": step % 7} for step in range(1, count + 1)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def running(client: httpx.Client, api_store: Store) -> Job:
    job = api_store.get(client.post("/jobs", json={"dataset": "digits", "ipc": 1}).json()["id"])
    for state in (State.STARTING, State.RUNNING):
        assert job is not None
        job = api_store.move(
            job,
            state,
            attempt=1,
            stages={"inspect": "done", "teachers": "cached", "distill": "running", "evaluate": "pending"},
            progress=Progress(stage="distill", completed=5, total=10, unit="step"),
        )
    assert job is not None
    return job


def metrics(client: httpx.Client, job: Job, **params: Any) -> dict[str, Any]:
    reply = client.get(f"/jobs/{job.id}/metrics", params=params)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def test_metrics_when_nothing_is_stored_are_empty(client: httpx.Client, running: Job) -> None:
    body = metrics(client, running)
    assert (body["keys"], body["series"]) == ([], [])
    assert body["stages"] == {
        "inspect": "complete", "teachers": "complete", "distill": "partial", "evaluate": "pending"
    }  # fmt: skip


def test_metrics_are_thinned_out_and_chosen_by_key(client: httpx.Client, api_storage: Storage, running: Job) -> None:
    api_storage.put(f"objects/{running.id}-1/distill-0123456789ab/history.jsonl", history(5000))
    body = metrics(client, running)
    assert body["keys"] == ["loss", "psi gap"]
    assert {series["key"] for series in body["series"]} == {"loss", "psi gap"}
    [series] = metrics(client, running, key="loss", max_points=50)["series"]
    assert (series["stage"], series["complete"], series["total"]) == ("distill", True, 5000)
    assert len(series["points"]) <= 50
    assert series["points"][0] == {"step": 1.0, "time": 1000.0, "value": 1.0}
    assert series["points"][-1]["step"] == 5000
    assert metrics(client, running, key="nothing")["series"] == []


def test_metrics_when_the_last_word_names_results_have_those_of_other_jobs(
    client: httpx.Client, api_store: Store, api_storage: Storage, running: Job
) -> None:
    api_storage.put("objects/other-1/teachers-aaaaaaaaaaaa/history.jsonl", history(3))
    file = FileRecord(
        name="history.jsonl", path="objects/other-1/teachers-aaaaaaaaaaaa/history.jsonl", size=1, sha256="0" * 64
    )
    result = StageResult(
        key=KEY, stage="teachers", built_by="other-1", created_at=now(), files=(file,), figures={}, seconds=1.0, environment={}
    )  # fmt: skip
    api_storage.create_record(result_path(KEY), result)
    api_storage.put(attempt_path(running.id, 1, "result.json"), json.dumps({"keys": [KEY, "sha256:none"]}).encode())
    api_store.move(running, State.SUCCEEDED)
    body = metrics(client, running, key="loss")
    assert [(series["stage"], series["result"], series["total"]) for series in body["series"]] == [
        ("teachers", "a" * 12, 3)
    ]


def test_metrics_of_a_running_stage_come_from_its_newest_checkpoint(
    client: httpx.Client, api_storage: Storage, running: Job
) -> None:
    for step, rows in ((5, 5), (10, 9)):
        header = json.dumps({"__metadata__": {"history": history(rows).decode()}}).encode()
        path = f"checkpoints/{running.id}/{'b' * 64}/1/{step:010d}"
        data = len(header).to_bytes(8, "little") + header + b"tensors"
        api_storage.put(f"{path}.safetensors", data)
        file = FileRecord(name="x", path=f"{path}.safetensors", size=len(data), sha256="0" * 64)
        record = CheckpointRecord(key="sha256:" + "b" * 64, step=step, file=file, environment={})
        api_storage.put_record(f"{path}.json", record)
    [series] = metrics(client, running, key="loss")["series"]
    assert (series["stage"], series["complete"], series["total"]) == ("distill", False, 9)


def test_metrics_when_stored_rows_are_damaged_pass_them_over(
    client: httpx.Client, api_storage: Storage, running: Job
) -> None:
    rows = b'{"step": 1, "loss": 2}\nnonsense\n[1]\n{"loss": 3}\n{"step": 2, "loss": NaN, "x": "y"}\n{"step": 3, "loss": 1}\n'
    api_storage.put(f"objects/{running.id}-1/distill-0123456789ab/history.jsonl", rows)
    [series] = metrics(client, running)["series"]
    assert [point["step"] for point in series["points"]] == [1, 3]


@pytest.mark.parametrize("query", ["max_points=1", "max_points=x", "key=", "key=%00", "max_points=1000000"])
def test_metrics_when_a_parameter_is_not_legal(client: httpx.Client, running: Job, query: str) -> None:
    assert client.get(f"/jobs/{running.id}/metrics?{query}").status_code == 422


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(2, 60))
def test_downsample_keeps_the_ends_the_extremes_and_the_order(values: list[float], most: int) -> None:
    points = [Point(step=float(step), time=None, value=value) for step, value in enumerate(values)]
    kept = downsample(points, most)
    assert len(kept) <= max(most, 0)
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
    if most >= 4:
        assert {min(values, default=0.0), max(values, default=0.0)} <= {point.value for point in kept} | {0.0}
