"""Uploads through the real API: what is taken, what is refused, and that nothing is left of what broke off."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import select
import socket
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.api import create_app
from service.api import uploads as routes
from service.cli import app as cli
from service.jobs import State
from service.keys import Keys
from service.settings import Settings
from service.store import Store
from service.uploads import Upload, Uploads
from worker.records import now
from worker.storage import Storage

ZIP = {"Content-Type": "application/zip"}


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 10, 20)).save(out, "PNG")
    return out.getvalue()


def archive(seed: int = 0, *, count: int = 5) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name in ("cat", "dog"):
            for index in range(count):
                packed.writestr(zipfile.ZipInfo(f"{name}/{index}.png"), png((seed * 7 + index) % 256))
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name in ("x", "y", "z"):
            for index in range(2):
                member, data = tarfile.TarInfo(f"{name}/{index}.png"), png(index)
                member.size = len(data)
                packed.addfile(member, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_of(settings: Settings) -> set[str]:
    return {path.name for path in (Path(settings.storage_url) / "uploads").glob("**/*") if path.is_file()}


def refused(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    problem: dict[str, Any] = reply.json()["errors"][0]
    assert problem["hint"]
    return problem


def send(client: httpx.Client, data: bytes, name: str = "animals", **headers: str) -> httpx.Response:
    return client.post("/datasets", params={"name": name}, content=data, headers=ZIP | headers)


def test_upload_is_kept_under_its_sum_and_sent_again_is_the_same(client: httpx.Client, api_settings: Settings) -> None:
    data = archive(1)
    first = send(client, data)
    assert first.status_code == 201, first.text
    body = first.json()
    assert first.headers["Location"] == f"/datasets/{sha256(data)}"
    assert (body["id"], body["uri"]) == (sha256(data), f"upload:{sha256(data)}")
    assert (body["num_classes"], body["num_train"], body["num_test"], body["smallest_class"]) == (2, 8, 2, 4)
    assert body["classes"] == {"cat": {"train": 4, "test": 1}, "dog": {"train": 4, "test": 1}}
    again = send(client, data, "another name")
    assert again.status_code == 200 and again.json() == body
    assert client.get(f"/datasets/{body['id']}").json() == body
    kept = Path(api_settings.storage_url) / "uploads" / f"{body['id']}.zip"
    assert kept.read_bytes() == data
    assert kept.stat().st_mode & 0o777 == 0o644


def test_job_under_a_known_key_is_answered_although_its_upload_is_gone(client: httpx.Client) -> None:
    made = send(client, archive(41)).json()
    body = {"dataset": {"name": "imagefolder", "uri": made["uri"], "image_size": 16}, "ipc": 1, "preset": "quick"}
    key = {"Idempotency-Key": "gone-1"}
    job = client.post("/jobs", json=body, headers=key).json()
    again = {"Idempotency-Key": "gone-2"}
    rerun = client.post(f"/jobs/{job['id']}/rerun", headers=again).json()
    for each in (job, rerun):
        assert client.post(f"/jobs/{each['id']}/cancel").json()["state"] == "cancelled"
    assert client.delete(f"/datasets/{made['id']}").status_code == 204
    for path, headers, before in (("/jobs", key, job), (f"/jobs/{job['id']}/rerun", again, rerun)):
        reply = client.post(path, json=body if path == "/jobs" else None, headers=headers)
        assert (reply.status_code, reply.json()["id"]) == (201, before["id"])
        assert reply.headers["Idempotency-Replayed"] == "true"
    assert client.post("/jobs", json=body).status_code == 422


def test_upload_may_come_in_pieces_and_as_any_archive(client: httpx.Client) -> None:
    data = tar()

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    made = client.post(
        "/datasets", params={"name": "t"}, content=pieces(), headers={"Content-Type": "application/x-tar"}
    )
    assert made.status_code == 201 and made.json()["kind"] == "tar" and made.json()["num_classes"] == 3


def test_sum_of_an_upload_is_compared_when_given(client: httpx.Client, api_settings: Settings) -> None:
    data = archive(2)
    right = base64.b64encode(hashlib.sha256(data).digest()).decode()
    wrong = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    for header in ("Repr-Digest", "Content-Digest"):
        problem = refused(send(client, data, **{header: f"sha-256=:{wrong}:"}), 422, "digest_mismatch")
        assert problem["field"] == header.lower() and sha256(data) in problem["message"]
        refused(send(client, data, **{header: "sha-256=:abc:"}), 422, "invalid_parameter")
    assert f"{sha256(data)}.zip" not in files_of(api_settings)
    assert send(client, data, **{"Repr-Digest": f"sha-512=:x:, sha-256=:{right}:"}).status_code == 201


def test_upload_when_not_legal_is_refused_and_leaves_nothing(client: httpx.Client, api_settings: Settings) -> None:
    before = files_of(api_settings)
    bad = io.BytesIO()
    with zipfile.ZipFile(bad, "w") as packed:
        packed.writestr("../../evil.png", png(0))
    problem = refused(send(client, bad.getvalue()), 422, "archive_refused")
    assert "evil.png" in problem["value"] and "leads out" in problem["message"]
    refused(send(client, b"PK not a zip"), 422, "archive_refused")
    refused(send(client, b""), 400, "malformed_body")
    refused(send(client, archive(), **{"Content-Type": "image/png"}), 415, "unsupported_media_type")
    refused(send(client, archive(), **{"Content-Encoding": "gzip"}), 415, "unsupported_media_type")
    refused(send(client, archive(), "new\nline"), 422, "invalid_parameter")
    for params in ({}, {"name": ""}, {"name": "x" * 129}):
        reply = client.post("/datasets", params=params, content=archive(), headers=ZIP)
        assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")
    assert files_of(api_settings) == before


def test_upload_when_too_large_is_413_by_what_it_declares_and_by_what_it_is(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, max_upload_bytes=1000)
    app = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert len(archive()) > 1000
        for content in (archive(), iter([archive()])):
            reply = client.post("/datasets", params={"name": "x"}, content=content, headers=ZIP)
            assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
            assert "NCFM_MAX_UPLOAD_BYTES" in reply.text
    assert files_of(settings) == set()


def test_upload_when_there_is_no_room_is_507(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, max_upload_bytes=1 << 50)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        headers = ZIP | {"Content-Length": str(1 << 49)}
        reply = client.post("/datasets", params={"name": "x"}, content=iter([b"PK"]), headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (507, "storage_full")


def test_upload_when_the_disk_is_full_is_507_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    # A device that takes no byte, in place of a disk that is full.
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Path("/dev/full").open("r+b", buffering=0))
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        reply = client.post("/datasets", params={"name": "x"}, content=archive(), headers=ZIP)
        assert (reply.status_code, reply.json()["code"]) == (507, "storage_full"), reply.text
    assert files_of(settings) == set()


def test_upload_when_broken_off_leaves_nothing(client: httpx.Client, api_settings: Settings) -> None:
    before, data = files_of(api_settings), archive(3)
    head = f"POST /datasets?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\nContent-Length: {len(data)}\r\n\r\n"
    for cut in (0, 10, len(data) - 1):
        with socket.create_connection((str(client.base_url.host), client.base_url.port)) as connection:
            connection.sendall(head.encode() + data[:cut])
            time.sleep(0.05)
    assert send(client, archive(4)).status_code == 201, "a broken one frees its place"
    assert files_of(api_settings) - before == {f"{sha256(archive(4))}.zip"}
    assert client.get(f"/datasets/{sha256(data)}").status_code == 404


def test_upload_when_nothing_more_comes_is_given_up(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SILENCE_S", 0.2)
    head = "POST /datasets?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\nContent-Length: 100\r\n\r\nPK"
    with socket.create_connection((str(client.base_url.host), client.base_url.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_uploads_at_once_are_bounded(client: httpx.Client) -> None:
    head = "POST /datasets?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\nContent-Length: 100\r\n\r\nPK"

    def opened() -> socket.socket:
        connection = socket.create_connection((str(client.base_url.host), client.base_url.port))
        connection.sendall(head.encode())
        return connection

    held = [opened() for _ in range(routes.MAX_AT_ONCE)]
    # Each is counted once its head has been read; one that came while ours was under way is refused itself, and comes again.
    deadline = time.monotonic() + 20
    while (reply := send(client, archive(5))).status_code != 429:
        assert time.monotonic() < deadline
        refused, _, _ = select.select(held, [], [], 0.05)
        for connection in refused:
            connection.close()
        held = [each for each in held if each not in refused] + [opened() for _ in refused]
    assert reply.headers["Retry-After"] == "10"
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 20
    while send(client, archive(5)).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_same_upload_at_the_same_time_is_kept_once(client: httpx.Client) -> None:
    data, codes = archive(6), []

    def go() -> None:
        codes.append(send(client, data).status_code)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 201} and len(codes) == 4
    assert [item["id"] for item in client.get("/datasets?limit=200").json()["items"]].count(sha256(data)) == 1


def test_list_of_uploads_is_paged_newest_first(client: httpx.Client) -> None:
    made = [send(client, archive(10 + number), f"n{number}").json()["id"] for number in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = client.get("/datasets", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        assert "classes" not in page["items"][0]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen[:5] == made[::-1] and len(seen) == len(set(seen))
    assert client.get("/datasets", params={"cursor": "0" * 64}).status_code == 422
    assert client.get("/datasets", params={"cursor": "x"}).status_code == 422
    for unknown in ("x", "%00", "..%2F..%2Fetc%2Fpasswd", made[0].upper(), made[0] + "0"):
        assert client.get(f"/datasets/{unknown}").status_code == 404
        assert client.delete(f"/datasets/{unknown}").status_code == 404


def test_upload_when_a_job_needs_it_stays_and_else_may_go(
    client: httpx.Client, api_settings: Settings, api_store: Store
) -> None:
    upload = send(client, archive(7)).json()
    spec = {"dataset": {"name": "imagefolder", "uri": upload["uri"], "image_size": 8}, "ipc": 1, "preset": "quick"}
    made = client.post("/jobs", json=spec)
    assert made.status_code == 201, made.text
    assert refused(client.post("/jobs", json=spec | {"ipc": 5}), 422, "invalid_spec")["field"] == "ipc"
    problem = refused(client.delete(f"/datasets/{upload['id']}"), 409, "conflict")
    assert made.json()["id"] in problem["message"]
    job = api_store.get(made.json()["id"])
    assert job is not None and api_store.move(job, State.CANCELLED) is not None
    assert client.delete(f"/datasets/{upload['id']}").status_code == 204
    assert f"{upload['id']}.zip" not in files_of(api_settings)
    assert client.get(f"/datasets/{upload['id']}").status_code == 404
    refused(client.post("/jobs", json=spec), 422, "invalid_spec")
    back = send(client, archive(7), "back")
    assert back.status_code == 201 and back.json()["name"] == "back"
    assert client.post("/jobs", json=spec).status_code == 201


def test_upload_whose_bytes_were_lost_is_taken_anew(client: httpx.Client, api_storage: Storage) -> None:
    data = archive(8)
    upload = send(client, data).json()
    api_storage.delete([f"uploads/{upload['id']}.zip"])
    assert send(client, data).status_code == 200
    assert api_storage.get(f"uploads/{upload['id']}.zip") == data


def test_upload_of_another_key_may_not_be_removed(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path))
    keys = Keys(app.state.store)
    mine, other = (keys.create(name, "submit", expires_at=None)[1] for name in ("mine", "other"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        headers = {"Authorization": f"Bearer {mine}"} | ZIP
        made = client.post("/datasets", params={"name": "x"}, content=archive(), headers=headers).json()
        assert made["owner"] == mine.split("_")[1]
        for token, status in ((other, 403), (mine, 204)):
            reply = client.delete(f"/datasets/{made['id']}", headers={"Authorization": f"Bearer {token}"})
            assert reply.status_code == status


def test_upload_of_several_keys_is_removed_by_each_for_itself(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path))
    keys = Keys(app.state.store)
    made = {name: keys.create(name, "submit", expires_at=None)[1] for name in ("first", "second")}
    made["admin"] = keys.create("admin", "admin", expires_at=None)[1]
    ids = {name: token.split("_")[1] for name, token in made.items()}
    with TestClient(app, base_url="http://127.0.0.1") as client:

        def ask(name: str, method: str = "GET") -> Any:
            headers = {"Authorization": f"Bearer {made[name]}"}
            return client.request(method, f"/datasets/{sha256(archive())}", headers=headers)

        def post(name: str) -> Any:
            headers = {"Authorization": f"Bearer {made[name]}"} | ZIP
            return client.post("/datasets", params={"name": f"of {name}"}, content=archive(), headers=headers)

        assert [post(name).status_code for name in ("first", "second")] == [201, 200]
        assert post("second").json()["owners"] == [ids["first"], ids["second"]]
        assert ask("first", "DELETE").status_code == 204
        left = ask("first").json()
        assert (left["owner"], left["owners"], left["name"]) == (ids["second"], [ids["second"]], "of second")
        assert ask("first", "DELETE").status_code == 403
        assert post("first").status_code == 200
        assert ask("admin", "DELETE").status_code == 204
        assert ask("second").status_code == 404
        assert post("admin").status_code == 201 and post("second").status_code == 200
        assert ask("admin", "DELETE").status_code == 204
        assert ask("second").json()["owners"] == [ids["second"]], "an admin's own claim is its own"


def test_upload_when_looking_into_it_takes_too_long_is_refused(
    client: httpx.Client, api_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "LOOK_TIMEOUT_S", 0.01)
    problem = refused(send(client, archive(30)), 422, "archive_refused")
    assert "takes longer than" in problem["message"] and "name its path" in problem["hint"]
    assert f"{sha256(archive(30))}.zip" not in files_of(api_settings)


def test_commit_goes_through_the_storage_where_a_nameless_file_gets_no_name(tmp_path: Path) -> None:
    """As on a root that is no folder; here in memory."""
    store, storage = Store(Settings(home=tmp_path).database), Storage("memory://")
    uploads = Uploads(store, storage)
    data = archive(9)
    upload = Upload(id=sha256(data), owner="local", name="m", size=len(data), facts={"kind": "zip"}, created_at=now())
    with uploads.spool(len(data)) as file:
        file.write(data)
        upload = uploads.commit(upload, file)
        assert upload.owners == ("local",)
    assert storage.get(upload.path) == data and uploads.is_stored(upload)
    uploads.release(upload, upload.owners)
    assert storage.get(upload.path) is None and uploads.get(upload.id) is None
    store.close()


SECRET_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"name": "imagefolder", "uri": "s3://AKIAABCDEFGHIJKLMNOP:hunter2@bucket/x.tar", "image_size": 8}, "dataset.uri"),
    ({"name": "imagefolder", "uri": "file:///data/x.tar?token=hunter2", "image_size": 8}, "dataset.uri"),
]


@pytest.mark.parametrize(("dataset", "field"), SECRET_SPECS)
def test_submission_with_a_secret_is_refused_and_not_echoed(
    client: httpx.Client, dataset: dict[str, Any], field: str
) -> None:
    reply = client.post("/jobs", json={"dataset": dataset, "ipc": 1})
    problem = refused(reply, 422, "invalid_spec")
    assert problem["field"] == field and "holds a secret" in problem["message"]
    assert "hunter2" not in reply.text


def test_path_of_data_when_outside_the_roots_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "data", tmp_path / "private"
    for folder in (root / "birds", outside):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(outside)
    settings = Settings(home=tmp_path / "home", data_dir=root, data_roots=(root,))
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:

        def post(uri: str) -> Any:
            dataset = {"name": "imagefolder", "uri": uri, "image_size": 8}
            return client.post("/jobs", json={"dataset": dataset, "ipc": 1, "preset": "quick"})

        for uri in ("birds", str(root / "birds"), f"file://{root}/birds", "not/there/yet.tar"):
            assert post(uri).status_code == 201, uri
        for uri in (
            "/etc",
            str(outside),
            "../private",
            "birds/../../private/x.tar",
            "link",
            "link/x.tar",
            f"file://{outside}",
        ):
            problem = refused(post(uri), 422, "invalid_spec")
            assert problem["field"] == "dataset.uri" and "NCFM_DATA_ROOTS" in problem["hint"], uri
        refused(post("upload:abc"), 422, "invalid_spec")
        refused(post(f"upload:{'0' * 64}"), 422, "invalid_spec")


def test_archive_in_a_bucket_when_it_may_not_be_read_is_refused(tmp_path: Path) -> None:
    for allowed in ((), ("s3://birds/archives", "gs://fish")):
        settings = Settings(home=tmp_path / str(len(allowed)), data_buckets=allowed)
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:

            def post(uri: str, client: TestClient = client) -> Any:
                dataset = {"name": "imagefolder", "uri": uri, "image_size": 8}
                return client.post("/jobs", json={"dataset": dataset, "ipc": 1, "preset": "quick"})

            for uri in ("s3://birds/archives/a.tar", "gs://fish/a.zip"):
                reply = post(uri)
                assert reply.status_code == (201 if allowed else 422), reply.text
                if not allowed:
                    problem = refused(reply, 422, "invalid_spec")
                    assert problem["field"] == "dataset.uri" and "NCFM_DATA_BUCKETS" in problem["hint"]
            for uri in (
                "s3://birds/archives2/a.tar",
                "s3://birds/archives/../a.tar",
                "s3://birds/archives/%2e%2e/a.tar",
                "s3://birds/archives",
                "az://birds/archives/a.tar",
                "http://birds/archives/a.tar",
            ):
                problem = refused(post(uri), 422, "invalid_spec")
                assert problem["field"] == "dataset.uri", uri


def test_roots_of_data_when_others_reach_the_api_are_the_data_folder(tmp_path: Path) -> None:
    for host, status in (("0.0.0.0", 422), ("127.0.0.1", 201)):
        app = create_app(Settings(home=tmp_path / host, host=host, data_dir=tmp_path / "data"))
        _, token = Keys(app.state.store).create("me", "submit", expires_at=None)
        with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {token}"}) as client:
            dataset = {"name": "imagefolder", "uri": "/elsewhere/birds.tar", "image_size": 8}
            assert client.post("/jobs", json={"dataset": dataset, "ipc": 1, "preset": "quick"}).status_code == status


def test_datasets_command_uploads_lists_and_removes(
    client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCFM_URL", str(client.base_url))
    monkeypatch.setenv("NCFM_HOME", str(tmp_path))

    def ncfm(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ncfm", "datasets", *arguments])
        try:
            cli.main()
        except SystemExit as left:
            return left.code if isinstance(left.code, int) else 0
        return 0

    file = tmp_path / "pets.zip"
    file.write_bytes(archive(20))
    assert ncfm("upload", str(file), "--json") == 0
    sent = json.loads(capsys.readouterr().out)
    assert (sent["id"], sent["name"], sent["smallest_class"]) == (sha256(archive(20)), "pets.zip", 4)
    assert ncfm("upload", str(file)) == 0
    assert capsys.readouterr().out.strip() == f"upload:{sent['id']}"
    assert ncfm("list", "--limit", "200") == 0
    assert "pets.zip" in capsys.readouterr().out
    assert ncfm("remove", sent["id"]) == 0
    assert ncfm("remove", sent["id"]) == cli.EXIT_BAD_INPUT
    for wrong in (tmp_path / "pets.rar", tmp_path / "none.zip"):
        assert ncfm("upload", str(wrong)) == cli.EXIT_BAD_INPUT
    assert "no such upload" in capsys.readouterr().err
