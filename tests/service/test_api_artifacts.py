from __future__ import annotations

import hashlib
import http.client
import io
import zipfile
from typing import Any

import httpx
import pytest

from service.jobs import Job, State
from service.store import Store
from service.testing import FakeDriver
from worker.storage import Storage

LARGE = bytes(range(256)) * 12_000
FILES = {
    "distilled/images.safetensors": LARGE,
    "distilled/preview.png": b"\x89PNG....",
    "distilled/a name with space & umlaut \u00fc.txt": b"text",
    "empty.json": b"",
}


def add_job(client: httpx.Client, store: Store) -> Job:
    body = client.post("/jobs", json={"dataset": "digits", "ipc": 1}).json()
    job = store.get(body["id"])
    assert job is not None
    for state in (State.STARTING, State.RUNNING):
        moved = store.move(job, state, attempt=1)
        assert moved is not None
        job = moved
    return job


@pytest.fixture(scope="module")
def job(client: httpx.Client, api_store: Store, api_storage: Storage) -> Job:
    """A job that has left a set."""
    running = add_job(client, api_store)
    result = FakeDriver(api_storage, running).succeed(FILES)
    api_storage.put("secret.txt", b"not of this job")
    done = api_store.move(running, State.SUCCEEDED, artifacts=result.artifacts)
    assert done is not None
    return done


def manifest(client: httpx.Client, job: Job) -> dict[str, dict[str, Any]]:
    reply = client.get(f"/jobs/{job.id}/artifacts").json()
    assert set(reply) == {"items", "next"}
    return {item["name"]: item for item in reply["items"]}


def test_manifest_when_listed_leads_to_each_file(client: httpx.Client, job: Job) -> None:
    items = manifest(client, job)
    assert set(items) == set(FILES)
    for name, data in FILES.items():
        assert (items[name]["size"], items[name]["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        reply = client.get(items[name]["href"])
        assert (reply.status_code, reply.content) == (200, data)
        assert reply.headers["Content-Length"] == str(len(data))
        assert reply.headers["ETag"] == f'"{items[name]["sha256"]}"'
        assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_artifact_when_typed_by_its_name(client: httpx.Client, job: Job) -> None:
    items = manifest(client, job)
    preview = client.get(items["distilled/preview.png"]["href"])
    assert preview.headers["Content-Type"] == "image/png"
    assert "Content-Disposition" not in preview.headers
    images = client.get(items["distilled/images.safetensors"]["href"])
    assert images.headers["Content-Type"] == "application/octet-stream"
    assert images.headers["Content-Disposition"] == "attachment; filename*=UTF-8''images.safetensors"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=5-5", 5, 6),
        ("bytes=3071990-", 3_071_990, 3_072_000),
        ("bytes=-7", 3_071_993, 3_072_000),
        ("bytes=-99999999", 0, 3_072_000),
        ("bytes=1000000-2500000", 1_000_000, 2_500_001),
        ("bytes=3071999-99999999", 3_071_999, 3_072_000),
    ],
)
def test_artifact_when_a_range_is_asked_for(client: httpx.Client, job: Job, asked: str, start: int, end: int) -> None:
    href = manifest(client, job)["distilled/images.safetensors"]["href"]
    reply = client.get(href, headers={"Range": asked})
    assert reply.status_code == 206
    assert reply.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(LARGE)}"
    assert reply.content == LARGE[start:end]


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,4-5", "bytes=a-b"])
def test_artifact_when_a_range_makes_no_sense_is_sent_whole(client: httpx.Client, job: Job, asked: str) -> None:
    href = manifest(client, job)["distilled/preview.png"]["href"]
    reply = client.get(href, headers={"Range": asked})
    assert (reply.status_code, reply.content) == (200, FILES["distilled/preview.png"])


def test_artifact_when_a_range_lies_outside(client: httpx.Client, job: Job) -> None:
    items = manifest(client, job)
    for name, asked in (("distilled/preview.png", "bytes=8-"), ("empty.json", "bytes=0-0"), ("empty.json", "bytes=-0")):
        reply = client.get(items[name]["href"], headers={"Range": asked})
        assert (reply.status_code, reply.json()["code"]) == (416, "range_not_satisfiable")
        assert reply.headers["Content-Range"] == f"bytes */{len(FILES[name])}"


def test_artifact_when_the_client_has_it_already(client: httpx.Client, job: Job) -> None:
    item = manifest(client, job)["distilled/preview.png"]
    etag = f'"{item["sha256"]}"'
    for held in (etag, f'"other", W/{etag}', "*"):
        reply = client.get(item["href"], headers={"If-None-Match": held})
        assert (reply.status_code, reply.content) == (304, b"")
    assert client.get(item["href"], headers={"If-None-Match": '"other"'}).status_code == 200
    resumed = client.get(item["href"], headers={"Range": "bytes=1-", "If-Range": etag})
    assert resumed.status_code == 206
    assert client.get(item["href"], headers={"Range": "bytes=1-", "If-Range": '"old"'}).status_code == 200


def test_artifact_when_asked_by_head_sends_no_body(client: httpx.Client, job: Job) -> None:
    for href in (manifest(client, job)["distilled/images.safetensors"]["href"], f"/jobs/{job.id}/artifacts.zip"):
        head = client.head(href)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["Content-Length"]) >= len(LARGE)


def test_archive_when_downloaded_holds_every_file_stored(client: httpx.Client, job: Job) -> None:
    reply = client.get(f"/jobs/{job.id}/artifacts.zip")
    assert reply.status_code == 200
    assert reply.headers["Content-Type"] == "application/zip"
    assert int(reply.headers["Content-Length"]) == len(reply.content)
    assert reply.headers["Content-Disposition"] == f'attachment; filename="ncfm-{job.id}.zip"'
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


@pytest.mark.parametrize(
    "path",
    [
        "../../../secret.txt",
        "..%2f..%2f..%2fsecret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "..\\..\\secret.txt",
        "distilled/../distilled/preview.png",
        "./distilled/preview.png",
        "distilled//preview.png",
        "distilled/preview.png/",
        "distilled/preview.png%00.txt",
        "DISTILLED/preview.png",
        "distilled",
        "",
        "objects/{id}-1/publish-x/distilled/preview.png",
        "file:///etc/passwd",
        "distilled/%C0%AE%C0%AE/preview.png",
        "x" * 8000,
    ],
)
def test_artifact_when_the_path_is_a_trick_is_not_found(client: httpx.Client, job: Job, path: str) -> None:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("GET", f"/jobs/{job.id}/artifacts/{path}".replace("{id}", job.id))
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    assert reply.status == 404
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert b"not of this job" not in body


def test_artifacts_when_there_are_none_yet(client: httpx.Client, api_store: Store) -> None:
    running = add_job(client, api_store)
    assert manifest(client, running) == {}
    archive = client.get(f"/jobs/{running.id}/artifacts.zip")
    assert (archive.status_code, archive.json()["code"]) == (409, "not_ready")
    one = client.get(f"/jobs/{running.id}/artifacts/distilled/preview.png")
    assert one.status_code == 404
    assert "once it has succeeded" in one.json()["detail"]


def test_artifact_when_its_file_is_gone_or_damaged(
    client: httpx.Client, api_store: Store, api_storage: Storage
) -> None:
    running = add_job(client, api_store)
    result = FakeDriver(api_storage, running).succeed({"a.bin": b"a" * 100, "b.bin": b"b" * 3_000_000})
    api_store.move(running, State.SUCCEEDED, artifacts=result.artifacts)
    api_storage.delete([result.artifacts[0].path])
    for path in ("artifacts/a.bin", "artifacts.zip"):
        reply = client.get(f"/jobs/{running.id}/{path}")
        assert (reply.status_code, reply.json()["code"]) == (410, "gone")
    api_storage.put(result.artifacts[1].path, b"b" * 2_999_999 + b"x")
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(f"/jobs/{running.id}/artifacts/b.bin")
