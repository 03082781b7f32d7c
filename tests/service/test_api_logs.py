"""Logs of a job's attempts: text, pages of lines, and streams that lose nothing between attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.api import log_reading
from service.client import Client
from service.jobs import State
from service.store import Store
from tests.service.test_api_streams import STREAM, later, messages, submit
from tests.service.world import move
from worker import logs
from worker.records import attempt_path
from worker.storage import Storage

PAGE = {"Accept": "application/json"}
FIRST, SECOND = b"one\ntwo\n", b"2\n"


@pytest.fixture
def write(api_storage: Storage) -> Any:
    def put(job_id: str, attempt: int, data: bytes) -> None:
        api_storage.put(attempt_path(job_id, attempt, "driver.log"), data)

    return put


@pytest.fixture
def twice(client: httpx.Client, api_store: Store, write: Any) -> str:
    """A job in its second attempt, whose log is the shorter one."""
    job_id = submit(client)
    job = move(api_store, job_id, State.STARTING, State.RUNNING, State.RECOVERING)
    assert api_store.move(job, State.STARTING, attempt=2) is not None
    write(job_id, 1, FIRST)
    write(job_id, 2, SECOND)
    return job_id


def end(store: Store, job_id: str) -> None:
    move(store, job_id, State.FAILED, attempt=2)


def heard(client: httpx.Client, job_id: str, last_id: str | None = None, **params: Any) -> list[tuple[str, str]]:
    """Id and data of all messages of a stream to its end."""
    headers = STREAM | ({} if last_id is None else {"Last-Event-ID": last_id})
    with client.stream("GET", f"/jobs/{job_id}/logs", headers=headers, params=params) as reply:
        assert reply.status_code == 200
        return [(each["id"], each["data"]) for each in messages(reply)]


def page(client: httpx.Client, job_id: str, **params: Any) -> dict[str, Any]:
    reply = client.get(f"/jobs/{job_id}/logs", params=params, headers=PAGE)
    assert (reply.status_code, reply.headers["Content-Type"]) == (200, "application/json"), reply.text
    document: dict[str, Any] = reply.json()
    return document


def test_log_when_streamed_has_every_byte_once_and_ends_with_the_job(
    client: httpx.Client, api_store: Store, write: Any
) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING)
    write(job_id, 1, b"one\ntw")
    later(0.4, lambda: write(job_id, 1, b"one\ntwo\nthr\xc3\xa9e\r\nlast"))
    later(1.2, lambda: move(api_store, job_id, State.FAILED))
    with client.stream("GET", f"/jobs/{job_id}/logs", headers=STREAM) as reply:
        got = list(messages(reply))
    assert "\n".join(each["data"] for each in got if "event" not in each) == "one\ntwo\nthr\u00e9e\nlast"
    assert [each["id"] for each in got if "event" not in each][:: len(got) - 2] == ["1:4", "1:20"]
    assert got[-1]["event"] == "end"
    assert json.loads(got[-1]["data"]) == {"state": "failed", "attempt": 1}
    assert heard(client, job_id, "1:4")[0][1] == "two\nthr\u00e9e\nlast"
    assert client.get(f"/jobs/{job_id}/logs", headers=STREAM | {"Last-Event-ID": "1:20"}).status_code == 204


def test_stream_when_a_next_attempt_begins_goes_on_with_it(client: httpx.Client, api_store: Store, write: Any) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING)
    write(job_id, 1, b"first\ncut")
    later(0.4, lambda: move(api_store, job_id, State.RECOVERING))
    later(0.6, lambda: write(job_id, 2, b"second\n"))
    later(0.7, lambda: move(api_store, job_id, State.STARTING, attempt=2))
    later(1.3, lambda: end(api_store, job_id))
    assert heard(client, job_id) == [
        ("1:6", "first"),
        ("1:9", "cut"),
        ("2:7", "second"),
        ("2:7", '{"state":"failed","attempt":2}'),
    ]


def test_stream_when_reconnected_in_a_later_attempt_loses_nothing(
    client: httpx.Client, api_store: Store, twice: str
) -> None:
    later(0.3, lambda: end(api_store, twice))
    assert heard(client, twice, "1:4") == [
        ("1:8", "two"), ("2:2", "2"), ("2:2", '{"state":"failed","attempt":2}')
    ]  # fmt: skip
    # The last log is shorter than what was sent of the first: there is one left to send.
    assert heard(client, twice, "1:8")[0] == ("2:2", "2")
    # As an id of old is: it counts in the first attempt, where it leaves out nothing that was not sent.
    assert [data for _, data in heard(client, twice, "4")[:2]] == ["two", "2"]
    assert client.get(f"/jobs/{twice}/logs", headers=STREAM | {"Last-Event-ID": "2:2"}).status_code == 204


def test_stream_before_its_first_line_says_where_to_go_on(client: httpx.Client, twice: str, api_store: Store) -> None:
    end(api_store, twice)
    with client.stream("GET", f"/jobs/{twice}/logs", headers=STREAM | {"Last-Event-ID": "1:8"}) as reply:
        assert next(reply.iter_lines()) == "id: 1:8"


def test_stream_when_pinned_ends_with_its_attempt(client: httpx.Client, api_store: Store, twice: str) -> None:
    assert heard(client, twice, attempt=1) == [("1:8", "one\ntwo"), ("1:8", '{"state":"starting","attempt":2}')]
    assert heard(client, twice, "4", attempt=1)[0] == ("1:8", "two")
    for last_id in ("1:8", "8"):
        headers = STREAM | {"Last-Event-ID": last_id}
        assert client.get(f"/jobs/{twice}/logs", params={"attempt": 1}, headers=headers).status_code == 204
    running = client.head(f"/jobs/{twice}/logs", params={"attempt": 2}, headers=STREAM | {"Last-Event-ID": "2:2"})
    assert running.status_code == 200, "more may come"
    move(api_store, twice, State.RUNNING, State.RECOVERING, attempt=2)
    assert heard(client, twice, attempt=2)[-1] == ("2:2", '{"state":"recovering","attempt":2}')


def test_stream_when_a_job_had_no_log_ends_and_is_204_after_that(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.CANCELLED, attempt=0)
    assert heard(client, job_id) == [("1:0", '{"state":"cancelled","attempt":0}')]
    assert client.get(f"/jobs/{job_id}/logs", headers=STREAM | {"Last-Event-ID": "1:0"}).status_code == 204


@pytest.mark.parametrize(
    ("params", "headers", "field"),
    [
        ({"after": "x"}, {}, "after"),
        ({"after": "-1"}, {}, "after"),
        ({"after": "1:"}, {}, "after"),
        ({"after": "\u0663"}, {}, "after"),
        ({"after": "3:0"}, {}, "after"),
        ({"after": "0:0"}, {}, "after"),
        ({"after": "9999999999:0"}, {}, "after"),
        ({"after": "1:0", "attempt": 2}, {}, "after"),
        ({"after": "1:0", "tail": 2}, {}, "tail"),
        ({"attempt": 3}, {}, "attempt"),
        ({}, STREAM | {"Last-Event-ID": "abc"}, "Last-Event-ID"),
        ({}, STREAM | {"Last-Event-ID": "9:1"}, "Last-Event-ID"),
        ({"attempt": 2}, STREAM | {"Last-Event-ID": "1:1"}, "Last-Event-ID"),
    ],
)
def test_log_when_a_place_is_not_legal_names_it_and_the_way_out(
    client: httpx.Client, twice: str, params: dict[str, Any], headers: dict[str, str], field: str
) -> None:
    reply = client.get(f"/jobs/{twice}/logs", params=params, headers=headers)
    [error] = reply.json()["errors"]
    assert (reply.status_code, error["field"]) == (422, field)
    assert error["value"] and error["hint"]


def test_pages_have_each_line_once_over_all_attempts(client: httpx.Client, api_store: Store, twice: str) -> None:
    first = page(client, twice, after="1:0", limit=1)
    assert first == {"attempt": 1, "items": ["one"], "position": "1:4", "next": "1:4"}
    second = page(client, twice, after=first["next"], limit=1)
    assert second == {"attempt": 1, "items": ["two"], "position": "1:8", "next": "2:0"}
    last = page(client, twice, after=second["next"])
    assert last == {"attempt": 2, "items": ["2"], "position": "2:2", "next": None}
    assert page(client, twice) == last, "the last attempt's, unless another is asked for"
    assert page(client, twice, attempt=1)["next"] is None
    assert page(client, twice, after=4, attempt=1)["items"] == ["two"]
    assert page(client, twice, after=999, attempt=1)["items"] == []


def test_page_has_whole_lines_while_more_may_come(
    client: httpx.Client, api_store: Store, twice: str, write: Any
) -> None:
    write(twice, 2, b"a\r\n\nthr\xc3")
    assert page(client, twice) == {"attempt": 2, "items": ["a", ""], "position": "2:4", "next": None}
    end(api_store, twice)
    assert page(client, twice, after="2:4") == {
        "attempt": 2, "items": ["thr\ufffd"], "position": "2:8", "next": None
    }  # fmt: skip


def test_page_before_an_attempt_is_empty(client: httpx.Client) -> None:
    job_id = submit(client)
    assert page(client, job_id) == {"attempt": 1, "items": [], "position": "1:0", "next": None}
    assert client.get(f"/jobs/{job_id}/logs", params={"attempt": 1}).text == ""


def test_tail_is_the_last_lines_in_every_form(
    client: httpx.Client, api_store: Store, twice: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(twice, 2, b"a\nb\nc\nd")
    assert page(client, twice, tail=2)["items"] == ["b", "c"]
    end(api_store, twice)
    assert page(client, twice, tail=2)["items"] == ["c", "d"]
    assert page(client, twice, tail=3, limit=2)["next"] == "2:6"
    assert page(client, twice, tail=9)["items"] == ["a", "b", "c", "d"]
    assert client.get(f"/jobs/{twice}/logs", params={"tail": 1}).text == "d"
    assert client.get(f"/jobs/{twice}/logs", params={"tail": 1, "attempt": 1}).text == "two\n"
    assert heard(client, twice, tail=2)[0] == ("2:7", "c\nd")
    assert heard(client, twice, "2:0", tail=2)[0][1] == "a\nb\nc\nd", "who comes back goes on where he was"
    monkeypatch.setattr(log_reading, "TAIL_BYTES", 4)
    assert page(client, twice, tail=9)["items"] == ["c", "d"]


def test_page_when_a_line_is_long_has_it_in_pieces(
    client: httpx.Client, twice: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reading, "READ_BYTES", 8)
    monkeypatch.setattr(log_reading, "PIECE_BYTES", 8)
    write(twice, 2, b"0123456789\nx\n")
    first = page(client, twice)
    assert (first["items"], first["next"]) == (["01234567"], "2:8")
    assert page(client, twice, after=first["next"])["items"] == ["89", "x"]


def test_log_in_parts_is_read_as_one(
    client: httpx.Client, api_store: Store, api_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 8)
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING)
    path = attempt_path(job_id, 1, "driver.log")
    api_storage.put(path, b"one\ntwo\n")
    later(0.5, lambda: api_storage.put(f"{path}.1", b"three\n"))
    later(1.0, lambda: api_storage.put(f"{path}.1", b"three\nfour\n"))
    later(1.5, lambda: api_storage.put(f"{path}.2", b"five\n"))
    later(2.2, lambda: move(api_store, job_id, State.FAILED))
    got = heard(client, job_id)
    assert "\n".join(data for _, data in got[:-1]) == "one\ntwo\nthree\nfour\nfive"
    assert got[-2][0] == "1:24"
    assert heard(client, job_id, "1:14")[0] == ("1:24", "four\nfive")
    assert client.get(f"/jobs/{job_id}/logs").text == "one\ntwo\nthree\nfour\nfive\n"
    assert client.get(f"/jobs/{job_id}/logs", params={"after": "1:4"}).text == "two\nthree\nfour\nfive\n"
    assert page(client, job_id, limit=3) == {
        "attempt": 1, "items": ["one", "two", "three"], "position": "1:14", "next": "1:14"
    }  # fmt: skip
    assert page(client, job_id, tail=2)["items"] == ["four", "five"]


def test_text_stays_what_is_given_unless_json_is_asked_for(client: httpx.Client, twice: str) -> None:
    path = f"/jobs/{twice}/logs"
    for accept in ("*/*", "text/plain", "text/html,*/*;q=0.8", "text/plain, application/json", "image/png"):
        reply = client.get(path, headers={"Accept": accept})
        assert (reply.headers["Content-Type"], reply.text) == ("text/plain; charset=utf-8", "2\n"), accept
    assert client.get(path, params={"after": "1:0", "limit": 1}).text == "one\n"
    axios = client.get(path, headers={"Accept": "application/json, text/plain, */*"})
    assert axios.json()["items"] == ["2"]
    assert client.head(path, headers=PAGE).headers["Content-Type"] == "application/json"


def test_document_has_all_three_forms(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/jobs/{id}/logs"]["get"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"text/plain", "application/json", "text/event-stream"}
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/LogLines"}
    assert {"attempt", "after", "limit", "tail", "Last-Event-ID"} <= {each["name"] for each in operation["parameters"]}


def test_client_reads_one_attempt_or_the_last_lines(client: httpx.Client, twice: str) -> None:
    with Client(str(client.base_url)) as api:
        assert api.logs(twice) == "2\n"
        assert api.logs(twice, attempt=1, tail=1) == "two\n"
        assert list(api.follow_log(twice, attempt=1)) == ["one\ntwo\n"]


def test_client_when_the_stream_breaks_between_attempts_goes_on_where_it_was() -> None:
    job = {"id": "01j", "state": "running", "attempt": 1, "created_at": "2026-01-01T00:00:00Z"}
    left: Iterator[httpx.Response | Exception] = iter(
        [
            httpx.Response(200, json=job),
            httpx.Response(200, content=b"id: 1:0\n\n"),
            httpx.ConnectError("restarting"),
            httpx.Response(200, content=b'id: 1:4\ndata: one\n\nevent: end\nid: 2:0\ndata: {"state": "failed"}\n\n'),
        ]
    )
    asked: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Last-Event-ID"))
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with Client("http://service", transport=httpx.MockTransport(handler)) as api:
        assert list(api.follow_log("01j")) == ["one\n"]
    assert asked == [None, "1:0", "1:0", "1:0"]
