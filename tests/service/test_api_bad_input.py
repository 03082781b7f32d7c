from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import Store

KEYS = (
    "dataset",
    "ipc",
    "preset",
    "method",
    "model",
    "teachers",
    "evaluate",
    "search",
    "resources",
    "seed",
    "name",
    "steps",
    "x",
)
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["digits", "quick"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=12,
)

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def nothing_half_made(api_store: Store, client: httpx.Client) -> Iterator[None]:
    """Fails a test that leaves a job behind."""
    before = sum(api_store.counts().values())
    yield
    assert sum(api_store.counts().values()) == before


def problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a reply; checks its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    document: dict[str, Any] = reply.json()
    assert set(document) == {"type", "title", "status", "detail", "instance", "code", "request_id", "errors"}
    assert document["status"] == status
    assert document["request_id"] == reply.headers["X-Request-ID"]
    assert document["errors"]
    assert all(set(error) == {"field", "value", "message", "hint"} for error in document["errors"])
    assert "Traceback" not in reply.text
    return document


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ('{"dataset": "cifar11", "ipc": 1}', "dataset.name", "'cifar11'"),
        ('{"ipc": 1}', "dataset", ""),
        ('{"dataset": "digits"}', "ipc", ""),
        ('{"dataset": "digits", "ipc": 0}', "ipc", "0"),
        ('{"dataset": "digits", "ipc": -1}', "ipc", "-1"),
        ('{"dataset": "digits", "ipc": 1.5}', "ipc", "1.5"),
        ('{"dataset": "digits", "ipc": 119}', "ipc", "119"),
        ('{"dataset": "digits", "ipc": "1"}', "ipc", "'1'"),
        ('{"dataset": "digits", "ipc": null}', "ipc", "None"),
        ('{"dataset": "digits", "ipc": true}', "ipc", "True"),
        ('{"dataset": "digits", "ipc": NaN}', "ipc", "NaN"),
        ('{"dataset": "digits", "ipc": 1, "method": {"image_lr": 1e400}}', "method.image_lr", "1e400"),
        ('{"dataset": "digits", "ipc": 1, "method": {"image_lr": -Infinity}}', "method.image_lr", "-Infinity"),
        ('{"dataset": "digits", "ipc": 1, "seed": %s}' % ("9" * 5000), "seed", "99999999999999999999e4980"),
        ('{"dataset": "digits", "ipc": 1, "stpes": 5}', "stpes", "5"),
        ('{"dataset": "digits", "ipc": 1, "experiment": "\\ud800"}', "experiment", "'\\ud800'"),
        ('["digits"]', "", "['digits']"),
        ('"digits"', "", "'digits'"),
        ("null", "", ""),
        ('{"dataset": ' + '{"name": ' * 40 + "1" + "}" * 40 + ', "ipc": 1}', "", ""),
        ('{"dataset": "digits", "ipc": 1, "preset": "paper"}', "preset", "'paper'"),
    ],
)
def test_submit_when_a_value_is_not_legal_names_field_and_value(
    client: httpx.Client, nothing_half_made: None, body: str, field: str, value: str
) -> None:
    document = problem(client.post("/jobs", content=body, headers=JSON), 422)
    assert document["code"] == "invalid_spec"
    assert (document["errors"][0]["field"], document["errors"][0]["value"]) == (field, value)


def test_submit_when_a_key_is_unknown_names_the_nearest(client: httpx.Client, nothing_half_made: None) -> None:
    body = {"dataset": "digits", "ipc": 1, "method": {"stepz": 5}}
    [error] = problem(client.post("/jobs", json=body), 422)["errors"]
    assert error["field"] == "method.stepz"
    assert "'steps'" in error["hint"]


@pytest.mark.parametrize("key", ["", "IPC", "seed ", "method-name", "\u00fc", "a.b", "x1"])
def test_submit_when_an_unknown_key_looks_like_nothing_known_names_it(
    client: httpx.Client, nothing_half_made: None, key: str
) -> None:
    [error] = problem(client.post("/jobs", json={"dataset": "digits", "ipc": 1, key: 1}), 422)["errors"]
    assert (error["field"], error["message"]) == (key, "unknown key")
    assert error["hint"]


def test_submit_when_several_fields_are_wrong_names_each(client: httpx.Client, nothing_half_made: None) -> None:
    body = {"dataset": "digits", "ipc": 0, "seed": -1, "method": {"reuse": 0}}
    document = problem(client.post("/jobs", json=body), 422)
    assert {error["field"] for error in document["errors"]} == {"ipc", "seed", "method.reuse"}


def test_submit_when_thousands_of_fields_are_wrong_answers_with_the_first(
    client: httpx.Client, nothing_half_made: None
) -> None:
    body = "{" + ", ".join(f'"{"k" * 40}{number}": NaN' for number in range(4000)) + "}"
    document = problem(client.post("/jobs", content=body, headers=JSON), 422)
    assert len(document["errors"]) == 50


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"dataset": "digits", "ipc": }', "not JSON at line 1, column 30"),
        (b'{"dataset": "digits"', "not JSON"),
        (b"dataset: digits\nipc: 1\n", "not JSON at line 1, column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"dataset": "\xff", "ipc": 1}', "not UTF-8 at byte 13"),
        (b'{"dataset": "digits", "ipc": 1, "ipc": 2}', "a key stands twice"),
        (b'{"dataset": "digits", "ipc": 01}', "not JSON"),
    ],
)
def test_submit_when_the_body_is_no_document_says_where(
    client: httpx.Client, nothing_half_made: None, body: bytes, says: str
) -> None:
    document = problem(client.post("/jobs", content=body, headers=JSON), 400)
    assert document["code"] == "malformed_body"
    assert document["errors"][0]["field"] == "body"
    assert says in document["detail"]


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 65_536):
        yield b" " * 65_536


def test_submit_when_the_body_is_too_large_declared_or_not(client: httpx.Client, nothing_half_made: None) -> None:
    big = json.dumps({"dataset": "digits", "ipc": 1, "x": "x" * 2_000_000})
    document = problem(client.post("/jobs", content=big, headers=JSON), 413)
    assert document["code"] == "body_too_large"
    streamed = client.post("/jobs", content=chunks(2_097_152), headers=JSON)
    assert "larger than 262144 bytes" in problem(streamed, 413)["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/yaml"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_submit_when_it_is_not_declared_as_json(
    client: httpx.Client, nothing_half_made: None, headers: dict[str, str]
) -> None:
    body = b'{"dataset": "digits", "ipc": 1}'
    document = problem(client.post("/jobs", content=body, headers=headers), 415)
    assert document["errors"][0]["field"] in ("Content-Type", "Content-Encoding")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(document=st.dictionaries(st.sampled_from(KEYS), DOCUMENTS) | DOCUMENTS)
def test_submit_when_the_document_is_arbitrary_is_taken_or_explained(client: httpx.Client, document: Any) -> None:
    based = {"dataset": "digits", "ipc": 1} | document if isinstance(document, dict) else document
    reply = client.post("/jobs", content=json.dumps(based), headers=JSON)
    if reply.status_code != 201:
        problem(reply, 422)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=many", "limit"),
        ("limit=1e400", "limit"),
        ("limit=", "limit"),
        ("cursor=", "cursor"),
        ("cursor=zzz", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=W10", "cursor"),
        ("cursor=eyJiZWZvcmUiOjF9", "cursor"),
        ("cursor=" + "a" * 300, "cursor"),
        ("state=done", "state"),
    ],
)
def test_list_when_a_parameter_is_not_legal_names_it(
    client: httpx.Client, nothing_half_made: None, query: str, field: str
) -> None:
    document = problem(client.get(f"/jobs?{query}"), 422)
    assert document["errors"][0]["field"] == field


@pytest.mark.parametrize(
    "path",
    [
        "/jobs/00000000000000000000000000",
        "/jobs/nothing",
        "/jobs/%00",
        "/jobs/%2e%2e",
        "/jobs/%ff%fe",
        "/jobs/" + "x" * 5000,
        "/jobs/nothing/events",
        "/jobs/nothing/logs",
        "/jobs/nothing/artifacts",
        "/jobs/nothing/artifacts.zip",
        "/jobs/nothing/artifacts/x",
        "/jobs/",
        "/nothing",
        "/jobs/nothing/nothing",
    ],
)
def test_get_when_there_is_no_such_thing(client: httpx.Client, path: str) -> None:
    assert problem(client.get(path), 404)["code"] == "not_found"


def test_cancel_when_there_is_no_such_job(client: httpx.Client) -> None:
    document = problem(client.post("/jobs/nothing/cancel"), 404)
    assert document["errors"][0] == {
        "field": "id", "value": "'nothing'", "message": "there is no such job", "hint": "GET /jobs lists all."
    }  # fmt: skip


def test_events_when_after_is_not_legal(client: httpx.Client) -> None:
    made = client.post("/jobs", json={"dataset": "digits", "ipc": 1}).json()
    for after in ("-1", "x", "1" * 400):
        document = problem(client.get(made["links"]["events"], params={"after": after}), 422)
        assert document["errors"][0]["field"] == "after"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/jobs", "GET, POST, HEAD"),
        ("PUT", "/jobs/nothing", "GET, PATCH, DELETE, HEAD"),
        ("GET", "/jobs/nothing/cancel", "POST"),
        ("POST", "/livez", "GET, HEAD"),
    ],
)
def test_method_when_not_allowed_names_those_that_are(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    reply = client.request(method, path)
    assert problem(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["Allow"] == allowed


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Host": "[::1"},
    ],
)
def test_submit_when_it_comes_from_a_page_elsewhere_is_refused(
    client: httpx.Client, nothing_half_made: None, headers: dict[str, str]
) -> None:
    reply = client.post("/jobs", json={"dataset": "digits", "ipc": 1}, headers=headers)
    assert problem(reply, 403)["code"] == "foreign_request"
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_request_id_when_given_is_kept_if_it_is_fit_for_a_log(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    assert client.get("/livez", headers={"X-Request-ID": "a b\tc"}).headers["X-Request-ID"] != "a b\tc"


def test_path_when_it_is_not_even_a_url_is_no_server_error(client: httpx.Client) -> None:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    for target in ("/jobs/../../etc/passwd", "/jobs//", "/jobs/%", "//etc/passwd", "/jobs/a%2fb"):
        connection.request("GET", target)
        reply = connection.getresponse()
        assert reply.status == 404
        assert reply.read().startswith(b"{")
    connection.close()
