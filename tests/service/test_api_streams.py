"""Following jobs: ETags, long polls, streams of events and logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import sse
from service.api.streams import Streams
from service.jobs import State
from service.reports import Progress
from service.store import Store
from tests.service.world import move
from worker.records import now
from worker.storage import Storage

STREAM = {"Accept": "text/event-stream"}
SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}
Message = dict[str, str]


def submit(client: httpx.Client) -> str:
    made: str = client.post("/jobs", json=SMALLEST).json()["id"]
    return made


def messages(reply: httpx.Response) -> Iterator[Message]:
    """The messages of a stream, which have data; pings have none."""
    fields: Message = {}
    for line in reply.iter_lines():
        if not line:
            if "data" in fields:
                yield fields
            fields = {}
        else:
            name, _, value = line.partition(": ")
            fields[name] = f"{fields[name]}\n{value}" if name in fields else value


def later(seconds: float, work: Any) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_job_when_unchanged_is_304_and_progress_makes_it_another(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    job = move(api_store, job_id, State.STARTING, State.RUNNING)
    etag = client.get(f"/jobs/{job_id}").headers["ETag"]
    same = client.get(f"/jobs/{job_id}", headers={"If-None-Match": f'"x", {etag}'})
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", etag)
    api_store.report(job, progress=Progress(stage="distill", completed=1, total=2, unit="step"))
    other = client.get(f"/jobs/{job_id}", headers={"If-None-Match": etag})
    assert (other.status_code, other.headers["ETag"] == etag) == (200, False)


def test_job_tells_place_progress_and_legal_actions(client: httpx.Client, api_store: Store) -> None:
    first, second = submit(client), submit(client)
    queue = [client.get(f"/jobs/{job_id}").json()["queue"] for job_id in (first, second)]
    assert queue[1]["position"] == queue[0]["position"] + 1
    assert queue[0]["reason"] == "waiting_for_cluster"
    assert client.get(f"/jobs/{first}").json()["actions"] == ["cancel", "priority", "labels", "rerun"]
    at = now()
    progress = Progress(
        stage="distill", completed=300, total=1000, unit="step", since=at, since_completed=100, updated_at=at + timedelta(seconds=20)
    )  # fmt: skip
    move(api_store, first, State.STARTING, State.RUNNING, progress=progress)
    body = client.get(f"/jobs/{first}").json()
    assert (body["queue"], body["actions"]) == (None, ["cancel", "labels", "rerun"])
    assert (body["progress"]["percent"], body["progress"]["eta_seconds"]) == (30.0, 70.0)
    move(api_store, first, State.FAILED)
    assert client.get(f"/jobs/{first}").json()["actions"] == ["labels", "rerun", "delete"]


@pytest.mark.parametrize("until", ["terminal", "change"])
def test_long_poll_answers_when_it_is_due(client: httpx.Client, api_store: Store, until: str) -> None:
    job_id = submit(client)
    # However late the question comes, it is of what was seen before the moves.
    seen = {"If-None-Match": client.get(f"/jobs/{job_id}").headers["ETag"]}
    later(0.4, lambda: move(api_store, job_id, State.STARTING))
    if until == "terminal":
        later(0.9, lambda: move(api_store, job_id, State.FAILED))
    started = time.monotonic()
    body = client.get(f"/jobs/{job_id}", params={"wait": 20, "until": until}, headers=seen).json()
    assert body["state"] == {"terminal": "failed", "change": "starting"}[until]
    assert time.monotonic() - started < 15


def test_long_poll_when_nothing_happens_answers_in_time(client: httpx.Client) -> None:
    job_id = submit(client)
    etag = client.get(f"/jobs/{job_id}").headers["ETag"]
    started = time.monotonic()
    reply = client.get(f"/jobs/{job_id}", params={"wait": 0.5, "until": "change"}, headers={"If-None-Match": etag})
    assert reply.status_code == 304
    assert 0.4 < time.monotonic() - started < 5


def test_events_when_streamed_come_as_they_happen_and_end_with_the_state(
    client: httpx.Client, api_store: Store
) -> None:
    job_id = submit(client)
    later(0.4, lambda: move(api_store, job_id, State.STARTING, State.RUNNING))
    later(0.8, lambda: move(api_store, job_id, State.FAILED))
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        got = list(messages(reply))
    assert [(each["event"], each.get("id")) for each in got] == [
        ("created", "1"), ("state", "2"), ("state", "3"), ("state", "4"), ("end", None)
    ]  # fmt: skip
    assert json.loads(got[-1]["data"]) == {"state": "failed", "attempt": 1}
    listed = client.get(f"/jobs/{job_id}/events").json()["items"]
    assert [json.loads(each["data"]) for each in got[:-1]] == listed


def test_events_when_a_log_hangs_in_the_storage_root_come_all_the_same(
    client: httpx.Client, api_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, is_back, size = submit(client), threading.Event(), Storage.size

    def hang(storage: Storage, path: str) -> int | None:
        if job_id in path:
            is_back.wait(20)
        return size(storage, path)

    monkeypatch.setattr(Storage, "size", hang)
    move(api_store, job_id, State.STARTING)
    with client.stream("GET", f"/jobs/{job_id}/logs", headers=STREAM) as log:
        # Held: the stream would end with its reader.
        lines = log.iter_lines()
        assert next(lines) == "id: 1:0"
        started = time.monotonic()
        later(0.4, lambda: move(api_store, job_id, State.FAILED))
        with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as reply:
            assert [each["event"] for each in messages(reply)] == ["created", "state", "state", "end"]
        assert time.monotonic() - started < 10
        is_back.set()
        assert "event: end" in list(lines)


def test_events_when_reconnected_go_on_and_after_the_end_are_204(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.FAILED)
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "1"}) as reply:
        assert [each.get("id") for each in messages(reply)] == ["2", "3", None]
    with client.stream("GET", f"/jobs/{job_id}/events", params={"after": 2}, headers=STREAM) as reply:
        assert [each.get("id") for each in messages(reply)] == ["3", None]
    assert client.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "3"}).status_code == 204
    bad = client.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "x"})
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


def test_events_when_streamed_have_progress_without_an_id(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    progress = Progress(stage="distill", completed=5, total=10, unit="step")
    job = move(api_store, job_id, State.STARTING, State.RUNNING)
    later(0.4, lambda: api_store.report(job, progress=progress))
    later(0.8, lambda: move(api_store, job_id, State.FAILED))
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as reply:
        [shown] = [each for each in messages(reply) if each["event"] == "progress"]
    assert "id" not in shown
    assert json.loads(shown["data"])["percent"] == 50.0


def test_streams_when_too_many_are_open_are_refused(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "max_streams_per_owner", 2)
    path = f"/jobs/{submit(client)}/events"
    with client.stream("GET", path, headers=STREAM) as first, client.stream("GET", path, headers=STREAM) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        refused = client.get(path, headers=STREAM)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["Retry-After"] == "5"
        assert client.get(path).status_code == 200
        assert client.get(path.removesuffix("/events"), params={"wait": 1}).status_code == 429
        assert client.head(path, headers=STREAM).status_code == 200
    deadline = time.monotonic() + 10
    while (reply := client.head(path, headers=STREAM)).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reply.status_code == 200
    with client.stream("GET", path, headers=STREAM) as freed:
        assert freed.status_code == 200


def test_stream_when_nothing_happens_pings(
    client: httpx.Client, api_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.2)
    job_id = submit(client)
    text, is_ended = "", False
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as reply:
        for piece in reply.iter_text():
            text += piece
            if text.count(": ping\n\n") >= 2 and not is_ended:
                is_ended = True
                move(api_store, job_id, State.CANCELLED)
    assert is_ended
    assert "event: end" in text


def test_streams_when_the_process_ends_are_closed_first(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    env = {**os.environ, "NCFM_HOME": str(tmp_path), "NCFM_PORT": str(port), "NCFM_HOST": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, "-m", "service.cli", "api"], env=env, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    client.get("/livez")
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            job_id = submit(client)
            with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as reply:
                lines = reply.iter_lines()
                assert next(lines) == "id: 1"
                started = time.monotonic()
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert not any("event: end" in line for line in rest)
            assert process.wait(15) == 0
            assert time.monotonic() - started < 12
    finally:
        process.kill()
        process.wait()
