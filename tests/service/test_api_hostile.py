"""A corpus of hostile requests: each is answered with a status that the document has for its route, as a problem, and leaves nothing."""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.store import Store

JSON = {"Content-Type": "application/json"}
DIGITS = '{"dataset": "digits", "ipc": 1'
NAMES = (
    "../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data",
    "${jndi:ldap://x/a}",
    "{{7*7}}",
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "$(touch /tmp/x)",
    "`id`",
    "%00",
    "\\u0000",
    "\\ud800\\udc00",
    "\\uffff",
    "\\u202e",
    "A" * 10_000,
    "__proto__",
    "constructor",
    "None",
    "NaN",
    "-1",
    "1e309",
    " ",
    "",
)
"""What an attacker puts where a name belongs."""
NUMBERS = (
    "-1",
    "0",
    "1e308",
    "1e400",
    "-0.0",
    "NaN",
    "Infinity",
    "9" * 400,
    "0.1e-400",
    "true",
    "null",
    '"1"',
    "[]",
    "{}",
    "1.5",
)
FIELDS = (
    "ipc",
    "seed",
    "priority",
    "method.steps",
    "method.image_lr",
    "teachers.count",
    "resources.cpus",
    "resources.gpus",
)


def nested(path: str, value: str) -> str:
    """A submission with one field set to literal JSON."""
    *parents, last = path.split(".")
    inner = f'"{last}": {value}'
    for parent in reversed(parents):
        inner = f'"{parent}": {{{inner}}}'
    start = '{"dataset": "digits"' if path == "ipc" else DIGITS
    return f"{start}, {inner}}}"


def specs() -> Iterator[str]:
    for name in NAMES:
        text = json.dumps(name) if "\\u" not in name else f'"{name}"'
        yield f'{{"dataset": {text}, "ipc": 1}}'
        yield f"{DIGITS}, {text}: 1}}"
        yield f'{DIGITS}, "labels": {{{text}: "x"}}}}'
        yield f'{DIGITS}, "preset": {text}}}'
    for field in FIELDS:
        for number in NUMBERS:
            yield nested(field, number)
    yield from (
        "",
        "\x00",
        "[]",
        "null",
        '"x"',
        "{" * 5000,
        "[" * 5000 + "]" * 5000,
        '{"a":' * 200 + "1" + "}" * 200,
        '{"dataset": {"name": "imagefolder", "uri": "file:///etc"}, "ipc": 1, "ipc": 1}',
        '{"dataset": {"name": "digits", "uri": 5}, "ipc": 1}',
        f'{DIGITS}, "evaluate": [{",".join(["{}"] * 3000)}]}}',
        f'{DIGITS}, "search": {{"space": {{"image_lr": [{",".join(["1"] * 5000)}]}}}}}}',
        f'{DIGITS}, "labels": {{{",".join(f"{chr(34)}k{i}{chr(34)}:{chr(34)}v{chr(34)}" for i in range(5000))}}}}}',
        '\ufeff{"dataset": "nothing", "ipc": 1}',
        "{'dataset': 'digits', 'ipc': 1}",
        '{"dataset": "digits", "ipc": 1} trailing',
        '{"dataset": "digits", "ipc": 1}{"dataset": "digits"}',
    )


def encoded(document: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


CURSORS = (
    "",
    "=",
    "====",
    "a",
    "zzz",
    "%00",
    "\u00fc",
    "' OR 1=1 --",
    "../..",
    "A" * 200,
    "A" * 5000,
    encoded([]),
    encoded({}),
    encoded(None),
    encoded([1, 2]),
    encoded(["id"]),
    encoded(["id", "0" * 16]),
    encoded(["\x00", "0" * 16]),
    encoded(["id", "0" * 16, "more"]),
    encoded([["id"], {}]),
    encoded("x" * 100),
    base64.urlsafe_b64encode(b"[" * 140).decode(),
    base64.urlsafe_b64encode(b"\xff\xfe\x00").decode(),
    base64.b64encode(b"\xfb\xff\xfe").decode(),
)

IDS = (
    "nothing",
    "%00",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%2f..%2f",
    "..%5c..",
    "%ff%fe",
    "%c0%ae%c0%ae",
    "0" * 26,
    "Z" * 26,
    "0" * 25 + "%0a",
    "x" * 8000,
    "%27%20OR%201%3D1",
    "*",
    "null",
    "validate",
    "-1",
    "%E2%80%AE",
    "a%2fb",
    ";id",
)
BELOW = (
    "",
    "/events",
    "/logs",
    "/metrics",
    "/attempts",
    "/artifacts",
    "/artifacts.zip",
    "/artifacts/x",
    "/rerun",
    "/cancel",
)

HEADERS = (
    {"Idempotency-Key": "\x7f"},
    {"Idempotency-Key": "a" * 4000},
    {"Idempotency-Key": "\u00fc".encode("latin-1")},
    {"Content-Type": "application/json; charset=utf-7"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Type": "application/json\t;;;"},
    {"Content-Encoding": "br"},
    {"Origin": "null"},
    {"Origin": "http://[::1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Host": "evil.example"},
    {"Host": "127.0.0.1@evil.example"},
    {"X-Request-ID": "x" * 5000},
    {"Accept": "text/event-stream," * 200},
    {"If-Match": '"' * 1000},
    {"If-None-Match": "," * 1000},
    {"Range": "bytes=0-" + "9" * 300},
    {"Last-Event-ID": "9" * 300},
    {"Last-Event-ID": "-1"},
    {"Last-Event-ID": "0x10"},
    {"X-Forwarded-For": "<script>"},
    {"Authorization": "Bearer ' OR 1=1"},
    {"Cookie": "a=b;" * 500},
    {"X-HTTP-Method-Override": "DELETE"},
)

QUERIES = (
    "limit=-1",
    "limit=1&limit=2",
    "limit=%00",
    "state=%00",
    "state=" + "&state=".join(["queued"] * 300),
    "label=a:b&" * 50 + "label=c:d",
    "label=%24.a:b",
    "label=a%22b:c",
    "label=a:%00",
    "label=" + "a" * 64 + ":x",
    "owner=%27%20OR%201%3D1%20--",
    "owner=%ed%a0%80",
    "dataset=%00",
    "method=" + "x" * 500,
    "created_after=0000-00-00",
    "created_after=9999-12-31T23:59:59.999999%2B00:00",
    "created_after=-1",
    "created_before=1e99",
    "created_before=2026-02-30T00:00:00Z",
    "order=newest;drop",
    "unknown=1",
    "%00=1",
    "&&&=&=",
    "cursor=%F0%9F%92%A9",
)


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    loaded: dict[str, Any] = client.get("/openapi.json").json()
    return loaded


@pytest.fixture(scope="module")
def a_job(client: httpx.Client) -> str:
    made: str = client.post("/jobs", json={"dataset": "digits", "ipc": 1}).json()["id"]
    return made


def documented(document: dict[str, Any], method: str, path: str) -> set[int]:
    """Statuses of the route that a path belongs to; where there is none, those that say so."""
    # Paths with a name of their own come before those with an id.
    for template, operations in sorted(document["paths"].items(), key=lambda item: "{" in item[0]):
        pattern = re.sub(r"\\\{path\\\}", ".*", re.escape(template))
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", pattern), path):
            operation = operations.get(method.lower())
            return {int(status) for status in operation["responses"]} if operation else {405}
    return {404}


def check(document: dict[str, Any], reply: httpx.Response, method: str, path: str) -> None:
    allowed = documented(document, method, path) | {403, 404, 405}
    assert reply.status_code in allowed, (reply.status_code, method, path[:100], reply.text[:300])
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert len(reply.content) < 20_000
        problem = reply.json()
        assert problem["errors"] and "Traceback" not in reply.text and ".py" not in reply.text


def test_corpus_is_large_enough() -> None:
    assert len(list(specs())) + len(CURSORS) + len(IDS) + len(HEADERS) + len(QUERIES) >= 300


def test_specs_when_hostile_are_taken_or_explained(
    client: httpx.Client, document: dict[str, Any], api_store: Store
) -> None:
    before = sum(api_store.counts().values())
    for number, spec in enumerate(specs()):
        tried = client.post("/jobs/validate", content=spec.encode("utf-8", "surrogatepass"), headers=JSON)
        check(document, tried, "POST", "/jobs/validate")
        if tried.status_code == 200 or number % 5:
            continue
        reply = client.post("/jobs", content=spec.encode("utf-8", "surrogatepass"), headers=JSON)
        check(document, reply, "POST", "/jobs")
        assert reply.status_code == tried.status_code, spec[:200]
    assert sum(api_store.counts().values()) == before


def test_bodies_of_changes_when_hostile_are_explained(
    client: httpx.Client, document: dict[str, Any], a_job: str
) -> None:
    for name in NAMES:
        for path, method, body in (
            (f"/jobs/{a_job}/rerun", "POST", {"overrides": {"dataset": name}}),
            (f"/jobs/{a_job}/rerun", "POST", {name: 1}),
            (f"/jobs/{a_job}/cancel", "POST", {"mode": name}),
            (f"/jobs/{a_job}", "PATCH", {"labels": {name: "x"}}),
            (f"/jobs/{a_job}", "PATCH", {name: 1}),
        ):
            reply = client.request(method, path, content=json.dumps(body), headers=JSON)
            check(document, reply, method, path)


@pytest.mark.parametrize("cursor", CURSORS, ids=range(len(CURSORS)))
def test_cursor_when_hostile_is_refused(client: httpx.Client, document: dict[str, Any], cursor: str) -> None:
    reply = client.get("/jobs", params={"cursor": cursor})
    check(document, reply, "GET", "/jobs")
    assert reply.status_code == 422


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_query_when_hostile_is_taken_or_explained(client: httpx.Client, document: dict[str, Any], query: str) -> None:
    check(document, client.get(f"/jobs?{query}"), "GET", "/jobs")


@pytest.mark.parametrize("job_id", IDS, ids=range(len(IDS)))
def test_id_when_hostile_is_not_found(client: httpx.Client, document: dict[str, Any], job_id: str) -> None:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    for below in BELOW:
        for method in ("GET", "POST", "DELETE", "PATCH") if below in ("", "/rerun") else ("GET",):
            connection.request(method, f"/jobs/{job_id}{below}", body="{}" if method != "GET" else None, headers=JSON)
            reply = connection.getresponse()
            body = reply.read()
            assert reply.status in (404, 405, 422, 400), (reply.status, method, job_id, below, body[:200])
            assert body.startswith(b"{"), body[:100]
    connection.close()


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_header_when_hostile_is_taken_or_explained(
    client: httpx.Client, document: dict[str, Any], a_job: str, headers: dict[str, Any]
) -> None:
    for method, path in (
        ("GET", f"/jobs/{a_job}"),
        ("PATCH", f"/jobs/{a_job}"),
        ("POST", "/jobs/validate"),
        ("POST", f"/jobs/{a_job}/rerun"),
        ("GET", "/jobs"),
        ("GET", f"/jobs/{a_job}/artifacts/x"),
    ):
        content = None if method == "GET" else "{}"
        check(document, client.request(method, path, content=content, headers=JSON | headers), method, path)
    if "Accept" not in headers:
        check(document, client.get(f"/jobs/{a_job}/events", headers=headers), "GET", f"/jobs/{a_job}/events")
        check(document, client.get(f"/jobs/{a_job}/logs", headers=headers), "GET", f"/jobs/{a_job}/logs")


@pytest.mark.parametrize(
    "target",
    [
        "/jobs/../../etc/passwd",
        "//",
        "/%",
        "/jobs%2f",
        "/./jobs/.",
        "/jobs/;/",
        "/JOBS",
        "/jobs\\x",
        "/?" + "a" * 6000,
        "/*",
    ],
)
def test_path_when_hostile_is_no_server_error(client: httpx.Client, target: str) -> None:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.putrequest("GET", target, skip_host=False)
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status < 500 and reply.status in (200, 307, 400, 404, 422), reply.status
    connection.close()
