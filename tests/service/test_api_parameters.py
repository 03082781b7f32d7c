"""Parameters of queries: unknown ones are refused by every route, and whatever is refused comes with the way out."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def a_job(client: httpx.Client) -> str:
    made: str = client.post("/jobs", json=SMALLEST).json()["id"]
    return made


def refused(reply: httpx.Response) -> dict[str, str]:
    """The one problem of a refusal."""
    assert reply.status_code == 422, reply.text
    [error] = reply.json()["errors"]
    found: dict[str, str] = error
    return found


@pytest.mark.parametrize(
    ("path", "name", "hint"),
    [
        ("/jobs?dataste=cifar10", "dataste", "Did you mean 'dataset'?"),
        ("/jobs?Limit=3", "Limit", "Did you mean 'limit'?"),
        ("/jobs/{id}/events?afer=3", "afer", "Did you mean 'after'?"),
        ("/jobs/{id}/metrics?maxpoints=3", "maxpoints", "Did you mean 'max_points'?"),
        ("/jobs/{id}/logs?tial=3", "tial", "Did you mean 'tail'?"),
        ("/jobs/{id}?x=3", "x", "Known: wait, until."),
        ("/datasets?x=3", "x", "Known: limit, cursor."),
        ("/jobs/{id}/attempts?limit=3", "limit", "Leave it out: there are none here."),
        ("/jobs/{id}/artifacts?x=3", "x", "Leave it out: there are none here."),
        ("/livez?v=3", "v", "Leave it out: there are none here."),
        ("/readyz?v=3", "v", "Leave it out: there are none here."),
        ("/capabilities?v=3", "v", "Leave it out: there are none here."),
        ("/metrics?v=3", "v", "Leave it out: there are none here."),
        ("/docs?v=3", "v", "Leave it out: there are none here."),
        ("/openapi.json?v=3", "v", "Leave it out: there are none here."),
        ("/?v=3", "v", "Leave it out: there are none here."),
    ],
)
def test_parameter_when_unknown_is_refused_with_the_nearest(
    client: httpx.Client, a_job: str, path: str, name: str, hint: str
) -> None:
    reply = client.get(path.format(id=a_job))
    assert reply.json()["code"] == "invalid_parameter"
    assert refused(reply) == {
        "field": name,
        "value": "'cifar10'" if name == "dataste" else "'3'",
        "message": "unknown parameter",
        "hint": hint,
    }
    assert client.head(path.format(id=a_job)).status_code == 422


def test_parameter_when_unknown_is_refused_before_anything_is_done(client: httpx.Client, a_job: str) -> None:
    before = len(client.get("/jobs", params={"limit": 200}).json()["items"])
    for path in ("/jobs", "/jobs/validate", f"/jobs/{a_job}/rerun", f"/jobs/{a_job}/cancel"):
        assert refused(client.post(path, params={"dry_run": "true"}, json=SMALLEST))["field"] == "dry_run"
    assert refused(client.request("DELETE", f"/jobs/{a_job}", params={"force": 1}))["field"] == "force"
    assert len(client.get("/jobs", params={"limit": 200}).json()["items"]) == before
    assert client.get(f"/jobs/{a_job}").json()["state"] == "queued"


def test_parameter_when_unknown_is_refused_by_streams_too(client: httpx.Client, a_job: str) -> None:
    for below in ("events", "logs"):
        reply = client.get(f"/jobs/{a_job}/{below}", params={"atempt": 1, "afterr": 2}, headers=STREAM)
        assert [error["field"] for error in reply.json()["errors"]] == ["atempt", "afterr"]


def test_document_has_422_for_every_route(client: httpx.Client) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            assert "422" in operation["responses"], (method, path)


@pytest.mark.parametrize(
    ("path", "field", "value", "hint"),
    [
        ("/jobs?limit=1000", "limit", "'1000'", "Choose 200 or less."),
        ("/jobs?limit=many", "limit", "'many'", "Write a whole number, such as 1."),
        ("/jobs?state=foo", "state", "'foo'", "Known: queued, starting, running, "),
        ("/jobs?state=queued&state=runing", "state", "'runing'", "Did you mean 'running'?"),
        ("/jobs?label=ab", "label", "'ab'", "Write label=key:value; "),
        ("/jobs?owner=%00", "owner", "'\\x00'", "Leave out the NUL."),
        ("/jobs?dataset=" + "x" * 200, "dataset", "'xxx", "Keep to 128 characters."),
        ("/jobs?" + "&".join(["label=a:b"] * 9), "label", "['a:b'", "Give 8 or fewer."),
        ("/jobs/{id}?wait=500", "wait", "'500'", "Choose 60 or less."),
        ("/jobs/{id}?wait=long", "wait", "'long'", "Write a number, such as 0.5."),
        ("/jobs/{id}?until=changed", "until", "'changed'", "Did you mean 'change'?"),
        ("/jobs/{id}/metrics?max_points=0", "max_points", "'0'", "Choose 2 or more."),
        ("/jobs/{id}/metrics?key=%00", "key", "'\\x00'", "Write the name of a metric"),
        ("/jobs/{id}/logs?limit=0", "limit", "'0'", "Choose 1 or more."),
        ("/datasets?cursor=x", "cursor", "'x'", "Pass `next` of the page before"),
    ],
)
def test_parameter_when_not_legal_comes_with_the_way_out(
    client: httpx.Client, a_job: str, path: str, field: str, value: str, hint: str
) -> None:
    error = refused(client.get(path.format(id=a_job)))
    assert error["field"] == field
    assert error["value"].startswith(value) and error["hint"].startswith(hint), error
    assert "pattern" not in error["message"] and "^" not in error["message"] + error["hint"]


def test_header_and_missing_parameter_come_with_the_way_out(client: httpx.Client, a_job: str) -> None:
    for below in ("events", "logs"):
        error = refused(client.get(f"/jobs/{a_job}/{below}", headers=STREAM | {"Last-Event-ID": "abc"}))
        assert (error["field"], error["value"]) == ("Last-Event-ID", "'abc'") and error["hint"]
    error = refused(client.post("/datasets", content=b"x", headers={"Content-Type": "application/zip"}))
    assert (error["field"], error["message"], error["hint"]) == ("name", "required", "Add it to the query: name=...")


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_page_of_another_site_is_told_how_else(client: httpx.Client, headers: dict[str, str]) -> None:
    [error] = client.post("/jobs", json=SMALLEST, headers=headers).json()["errors"]
    assert "curl" in error["hint"]


@pytest.mark.parametrize(
    ("body", "field", "value", "hint"),
    [
        ({"mode": "hard"}, "mode", "'hard'", "Known: graceful, force."),
        ({"mode": "forced"}, "mode", "'forced'", "Did you mean 'force'?"),
        ({"grace_seconds": -1}, "grace_seconds", "-1", "Choose 0 or more."),
        ({"grace_seconds": 4000}, "grace_seconds", "4000", "Choose 3600 or less."),
        ({"grace_seconds": "1"}, "grace_seconds", "'1'", "Write a number without quotes, such as 0.01."),
        ({"checkpoint": 1}, "checkpoint", "1", "Write true or false."),
        ({"mod": "force"}, "mod", "'force'", "Did you mean 'mode'?"),
    ],
)
def test_cancel_when_not_legal_comes_with_the_way_out(
    client: httpx.Client, a_job: str, body: dict[str, Any], field: str, value: str, hint: str
) -> None:
    error = refused(client.post(f"/jobs/{a_job}/cancel", json=body))
    assert (error["field"], error["value"], error["hint"]) == (field, value, hint)


def test_unknown_key_is_shown_with_its_value(client: httpx.Client, a_job: str) -> None:
    for method, path, body, value in (
        ("POST", "/jobs", SMALLEST | {"stpes": 5}, "5"),
        ("POST", "/jobs", SMALLEST | {"method": {"stepz": 6}}, "6"),
        ("POST", "/jobs", SMALLEST | {"priorty": 7}, "7"),
        ("POST", f"/jobs/{a_job}/rerun", {"override": {}}, "{}"),
        ("PATCH", f"/jobs/{a_job}", {"label": "x"}, "'x'"),
    ):
        error = refused(client.request(method, path, json=body))
        assert error["value"] == value and error["hint"], (path, error)


def test_address_that_cannot_be_read_is_shown_with_the_way_out_apart(client: httpx.Client) -> None:
    dataset = {"name": "imagefolder", "uri": "ftp://host/birds.tar", "image_size": 64}
    error = refused(client.post("/jobs", json={"dataset": dataset, "ipc": 1}))
    assert (error["field"], error["value"]) == ("dataset.uri", "'ftp://host/birds.tar'")
    assert error["message"] == "ftp:// cannot be read here"
    assert error["hint"].startswith("Copy the data")
