"""The HTTP client: requests, answers, and what it makes of trouble."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.client import Client, ClientError, ServiceAway
from service.replies import Job

Handler = Callable[[httpx.Request], httpx.Response]

JOB = {
    "id": "01j",
    "state": "running",
    "reason": None,
    "spec": {"dataset": {"name": "digits"}, "ipc": 1},
    "requested": {"dataset": "digits", "ipc": 1},
    "warnings": ["slow"],
    "progress": {"stage": "distill", "completed": 10, "total": 500, "unit": "step"},
    "stages": {"teachers": "cached", "distill": "running"},
    "result": None,
    "error": None,
    "created_at": "2026-01-01T00:00:00Z",
    "started_at": None,
    "finished_at": None,
    "links": {"self": "/jobs/01j"},
    "a_later_field": 1,
}
FIGURE = {"mean": 87.0, "std": 0.5, "n": 10, "best_mean": 88.0, "values": []}


def client_that(handler: Handler) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler))


def answering(status: int, document: object, content_type: str = "application/json") -> Client:
    text = document if isinstance(document, str) else json.dumps(document)
    return client_that(lambda _request: httpx.Response(status, text=text, headers={"content-type": content_type}))


def problem(status: int, *errors: dict[str, str], detail: str = "it is wrong") -> Client:
    return answering(status, {"title": "Wrong", "detail": detail, "errors": errors}, "application/problem+json")


def test_submit_posts_the_document_and_gives_the_job() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(201, json=JOB)

    job = client_that(handler).submit({"dataset": "digits", "ipc": 1})

    assert (seen[0].method, seen[0].url.path) == ("POST", "/jobs")
    assert json.loads(seen[0].content) == {"dataset": "digits", "ipc": 1}
    assert (job.id, job.title, job.warnings, job.is_final) == ("01j", "digits ipc 1", ("slow",), False)


def test_error_names_field_value_and_way_out_when_the_service_refuses() -> None:
    errors = (
        {"field": "ipc", "value": "0", "message": "less than 1", "hint": "Choose 1 to 118."},
        {"field": "dataset", "value": "'digit'", "message": "unknown", "hint": "Did you mean 'digits'?"},
    )

    with pytest.raises(ClientError) as caught:
        problem(422, *errors).submit({})

    assert str(caught.value).splitlines() == [
        "ipc: less than 1 (got 0). Choose 1 to 118.",
        "dataset: unknown (got 'digit'). Did you mean 'digits'?",
    ]


def test_error_has_the_detail_when_no_fields_are_named() -> None:
    with pytest.raises(ClientError, match="it is wrong"):
        problem(409).cancel("01j")


@pytest.mark.parametrize(
    "client",
    [
        answering(404, "<h1>Not found</h1>", "text/html"),
        answering(200, "<h1>Hello</h1>", "text/html"),
        answering(200, {"id": 1}),
        answering(422, "[1]", "application/problem+json"),
        answering(422, "{", "application/problem+json"),
    ],
)
def test_stranger_is_told_when_something_else_answers(client: Client) -> None:
    with pytest.raises(ClientError, match="not the API of this service"):
        client.job("01j")


def test_service_away_when_nothing_answers() -> None:
    def handler(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(ServiceAway, match=r"Connection refused.*ncfm status"):
        client_that(handler).jobs()


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://", "http://[::1", "http://host:port"])
def test_address_is_refused_when_it_is_none(url: str) -> None:
    with pytest.raises(ClientError, match="url"):
        Client(url).jobs()


def test_numbers_are_refused_when_json_has_none_of_the_kind() -> None:
    with pytest.raises(ClientError, match="finite"):
        answering(201, JOB).submit({"ipc": float("nan")})


def test_jobs_come_in_pages() -> None:
    client = client_that(
        lambda request: httpx.Response(200, json={"items": [JOB], "next": request.url.params.get("cursor")})
    )

    jobs, following = client.jobs(limit=1, cursor="abc")

    assert ([job.id for job in jobs], following) == (["01j"], "abc")


def test_events_come_in_order_over_all_pages() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        after = int(request.url.params["after"])
        event = {"seq": after + 1, "at": "2026-01-01T00:00:00Z", "type": "state", "data": {}}
        return httpx.Response(200, json={"items": [event], "next": after + 1 if after < 2 else None})

    assert [event.seq for event in client_that(handler).events("01j")] == [1, 2, 3]


def test_ids_cannot_leave_their_place_in_the_path() -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return httpx.Response(200, json=JOB)

    client_that(handler).job("../readyz?x#y")

    assert paths == ["/jobs/..%2Freadyz%3Fx%23y"]


def serving(files: dict[str, bytes], sums: dict[str, str] | None = None) -> Client:
    def handler(request: httpx.Request) -> httpx.Response:
        name = request.url.path.partition("/artifacts")[2].removeprefix("/")
        if name:
            return httpx.Response(200, content=files[name])
        items = [
            {"name": name, "size": len(data), "sha256": (sums or {}).get(name, hashlib.sha256(data).hexdigest())}
            for name, data in files.items()
        ]
        return httpx.Response(200, json={"items": items, "next": None})

    return client_that(handler)


def test_pull_writes_every_file_below_the_folder(tmp_path: Path) -> None:
    files = {"distilled/preview.png": b"png", "evaluation.json": b"{}"}

    fetched = serving(files).pull("01j", tmp_path / "set")

    assert {path.relative_to(tmp_path / "set").as_posix(): path.read_bytes() for path in fetched} == files
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_pull_refuses_when_a_file_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"damaged \(got 'a\.png'\)"):
        serving({"a.png": b"png"}, {"a.png": "0" * 64}).pull("01j", tmp_path)


def test_pull_refuses_when_a_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="outside the folder"):
        serving({"../evil": b"x"}).pull("01j", tmp_path / "set")
    assert list(tmp_path.rglob("evil")) == []


def test_download_leaves_nothing_when_the_connection_breaks(tmp_path: Path) -> None:
    class Breaking(httpx.SyncByteStream):
        def __iter__(self) -> object:  # type: ignore[override]
            yield b"half"
            raise httpx.ReadError("reset")

    with pytest.raises(ServiceAway, match="reset"):
        client_that(lambda _request: httpx.Response(200, stream=Breaking())).download("01j", "a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_wait_goes_on_when_the_service_is_away_for_a_while() -> None:
    answers = iter([httpx.Response(200, json=JOB), None, httpx.Response(200, json=JOB | {"state": "succeeded"})])

    def handler(_request: httpx.Request) -> httpx.Response:
        answer = next(answers)
        if answer is None:
            raise httpx.ConnectError("restarting")
        return answer

    states: list[str] = []
    job = client_that(handler).wait("01j", on_change=lambda each: states.append(each.state), poll_s=0.01)

    assert (job.state, states) == ("succeeded", ["running", "succeeded"])


def test_wait_gives_up_when_the_service_stays_away() -> None:
    def handler(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    with pytest.raises(ServiceAway, match="gone"):
        client_that(handler).wait("01j", on_change=lambda _job: None, poll_s=0.01, patience_s=0.05)


def test_complaint_has_the_words_of_the_error_when_a_job_failed() -> None:
    error = {"code": "dataset_unavailable", "problems": [{"field": "d", "value": "", "message": "gone", "hint": ""}]}

    assert Job.model_validate(JOB | {"state": "failed", "error": error}).complaint == "d: gone."


def test_figures_are_read_when_a_job_succeeded() -> None:
    result = {"distilled": FIGURE, "random_real": FIGURE, "full": FIGURE, "evaluations": [], "seconds": {"total": 9.0}}

    job = Job.model_validate(JOB | {"state": "succeeded", "result": result})

    assert job.result is not None and job.result.full is not None
    assert (job.result.full.mean, job.result.full.n, job.result.seconds) == (87.0, 10, {"total": 9.0})
