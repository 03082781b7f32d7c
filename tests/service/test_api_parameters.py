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
