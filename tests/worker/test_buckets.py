"""Archives in buckets: which may be read, and that each version of one is fetched once, whole, and without a secret in what is said."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url
from PIL import Image
from pydantic import ValidationError

from ncfm_core.errors import DatasetError, StorageError
from ncfm_core.spec import DatasetSpec
from worker import buckets
from worker.buckets import Place, allowed_object, fetch_object, place_of
from worker.data import load
from worker.settings import Surroundings

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEYabcdefghi"
BIRDS = Place("s3", "birds", ("sets", "a.tar"))
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def packed(shade: int, *, mode: str = "w") -> bytes:
    """A tar of two classes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name in ("cat", "dog"):
            for index in range(3):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (shade, index, len(name))).save(image, "PNG")
                member = tarfile.TarInfo(f"{name}/{index}.png")
                member.size = image.tell()
                archive.addfile(member, io.BytesIO(image.getvalue()))
    return out.getvalue()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://birds/archives/a.tar",
        "s3://birds/archives/deep/er/a.TGZ",
        "s3://birds/archives/with spaces, and ü.zip",
        "gs://fish/a.tar.gz",
        "az://cats/a.zip",
    ],
)
def test_object_below_an_allowed_prefix_may_be_read(uri: str) -> None:
    assert str(allowed_object(uri, ["s3://birds/archives/", "gs://fish", "az://cats"])) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "s3://birds/archives2/a.tar",
        "s3://birds/archives.tar",
        "s3://birds/Archives/a.tar",
        "s3://birds/a.tar",
        "s3://birds2/archives/a.tar",
        "gs://birds/archives/a.tar",
    ],
)
def test_object_outside_of_every_prefix_is_refused_with_the_way_out(uri: str) -> None:
    for allowed in (["s3://birds/archives"], []):
        with pytest.raises(DatasetError, match="outside the buckets") as caught:
            allowed_object(uri, allowed)
        [problem] = caught.value.problems
        assert problem.field == "dataset.uri" and uri in problem.value
        assert "NCFM_DATA_BUCKETS" in problem.hint and all(each in problem.hint for each in allowed)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://birds/archives/../private/a.tar", "empty part"),
        ("s3://birds/archives/./a.tar", "empty part"),
        ("s3://birds/archives//a.tar", "empty part"),
        ("s3://birds/archives/%2e%2e/private/a.tar", "holds %"),
        ("s3://birds/archives/..%2fprivate/a.tar", "holds %"),
        ("s3://birds/archives\\..\\a.tar", "backslash"),
        ("s3://birds/archives/a.tar?versionId=1", "holds %"),
        ("s3://birds/archives/a.tar#x", "holds %"),
        ("s3://birds/archives/a\u202e.tar", "cannot be printed"),
        ("s3://me:hunter2@birds/archives/a.tar", "credentials"),
        ("s3://", "does not name a bucket"),
        ("s3:///archives/a.tar", "does not name a bucket"),
        ("s3://../archives/a.tar", "does not name a bucket"),
        ("s3://birds:9000/archives/a.tar", "does not name a bucket"),
        ("http://birds/archives/a.tar", "does not begin"),
        ("S3://birds/archives/a.tar", "does not begin"),
    ],
)
def test_uri_that_is_not_plain_is_refused_whatever_is_allowed(uri: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as caught:
        allowed_object(uri, ["s3://birds", "s3://birds/archives"])
    assert "hunter2" not in str(caught.value) and caught.value.problems[0].hint


@pytest.mark.parametrize("uri", ["s3://birds/archives/", "s3://birds/archives", "s3://birds", "s3://birds/a.tar/"])
def test_folder_of_a_bucket_is_refused_with_the_way_out(uri: str) -> None:
    with pytest.raises(DatasetError, match=r"Pack the folder into one object \(.tar.gz"):
        allowed_object(uri, ["s3://birds"])


def test_prefixes_come_with_commas_between_and_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCFM_DATA_BUCKETS", "s3://birds/archives/, gs://fish")
    assert Surroundings().data_access["data_buckets"] == ("s3://birds/archives/", "gs://fish")
    monkeypatch.setenv("NCFM_DATA_BUCKETS", "")
    assert Surroundings().data_buckets == ()
    for wrong in ("birds", "s3://me:hunter2hunter2@birds", "http://birds", "s3://birds/../x", "*"):
        monkeypatch.setenv("NCFM_DATA_BUCKETS", wrong)
        with pytest.raises(ValidationError, match="write them as s3://"):
            Surroundings()


@pytest.fixture(params=["folder", "memory"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A bucket in a folder, or in memory."""
    store = LocalStore(tmp_path / "bucket", mkdir=True) if request.param == "folder" else MemoryStore()
    monkeypatch.setattr(buckets, "open_bucket", lambda place: store)
    return store


def files_of(folder: Path) -> list[bytes]:
    return [each.read_bytes() for each in folder.iterdir() if not each.name.startswith(".")]


def test_object_is_fetched_once_for_each_version(
    bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 1000)
    folder, first, second = tmp_path / "cache", packed(1), packed(2)
    assert len(first) > 3 * 1000 and len(first) == len(second)
    obstore.put(bucket, BIRDS.key, first)
    file = fetch_object(BIRDS, folder)
    assert file.read_bytes() == first and file.name.endswith(".tar")
    changed = file.stat().st_mtime
    assert changed == pytest.approx(obstore.head(bucket, BIRDS.key)["last_modified"].timestamp(), abs=1e-3)

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("it is here already")

    with monkeypatch.context() as patched:
        patched.setattr(obstore, "get", fail)
        assert fetch_object(BIRDS, folder) == file
    obstore.put(bucket, BIRDS.key, second)
    other = fetch_object(BIRDS, folder)
    assert other != file and other.read_bytes() == second
    assert sorted(files_of(folder)) == sorted([first, second])
    other.write_bytes(b"cut")
    assert fetch_object(BIRDS, folder).read_bytes() == second


def test_object_that_changes_while_it_is_read_is_read_anew_and_never_mixed(
    bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 1000)
    first, second, real = packed(1), packed(2), obstore.get
    obstore.put(bucket, BIRDS.key, first)
    changes = [second]

    def get(store: Any, path: str, **options: Any) -> Any:
        answer = real(store, path, **options)
        if changes:
            obstore.put(bucket, BIRDS.key, changes.pop())
        return answer

    monkeypatch.setattr(obstore, "get", get)
    assert fetch_object(BIRDS, tmp_path / "cache").read_bytes() == second
    assert files_of(tmp_path / "cache") == [second]
    obstore.put(bucket, BIRDS.key, packed(3))
    changes.extend(packed(n) for n in range(4, 9))
    with pytest.raises(StorageError, match="changes while it is read"):
        fetch_object(BIRDS, tmp_path / "cache")
    assert files_of(tmp_path / "cache") == [second] and not list((tmp_path / "cache").glob("*.partial"))


def test_object_that_is_not_there_or_finds_no_room_is_said(
    bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match="there is no such object") as caught:
        fetch_object(BIRDS, tmp_path / "cache")
    assert str(BIRDS) in caught.value.problems[0].value and caught.value.problems[0].hint
    obstore.put(bucket, BIRDS.key, packed(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DatasetError, match="there is no room") as caught:
        fetch_object(BIRDS, tmp_path / "cache")
    assert "NCFM_CACHE_DIR" in caught.value.problems[0].hint
    monkeypatch.undo()
    monkeypatch.setattr(buckets, "open_bucket", lambda place: bucket)
    monkeypatch.setattr(buckets, "MAX_BYTES", 100)
    with pytest.raises(DatasetError, match="larger than"):
        fetch_object(BIRDS, tmp_path / "cache")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot be written"):
        fetch_object(BIRDS, tmp_path / "file")


def test_object_when_tasks_ask_at_once_is_fetched_by_one(
    bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore.put(bucket, BIRDS.key, packed(1))
    asked, real = [], obstore.get

    def get(store: Any, path: str, **options: Any) -> Any:
        asked.append(path)
        return real(store, path, **options)

    monkeypatch.setattr(obstore, "get", get)
    threads = [threading.Thread(target=fetch_object, args=(BIRDS, tmp_path / "cache")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and files_of(tmp_path / "cache") == [packed(1)]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a machine with credentials."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    named = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    for name, value in (named | {"AWS_ALLOW_HTTP": "true", "NO_PROXY": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of a server that speaks S3, with a bucket `birds`."""
    command = [sys.executable, "-c", MOTO]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        assert httpx.put(f"{url}/birds", trust_env=False, timeout=60).status_code == 200
        yield url
        server.stdin.close()


def images(uri: str) -> DatasetSpec:
    return DatasetSpec(name="imagefolder", uri=uri, image_size=8)


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_archive_in_s3_gives_the_same_data_as_the_file(
    cloud: pytest.MonkeyPatch, s3: str, tmp_path: Path, ending: str, mode: str
) -> None:
    cloud.setenv("AWS_ENDPOINT_URL", s3)
    bucket = from_url("s3://birds")
    access = Surroundings(home=tmp_path, data_dir=tmp_path, data_buckets=("s3://birds/sets",)).data_access
    uri, file = f"s3://birds/sets/my birds.{ending}", tmp_path / f"birds.{ending}"
    digests = []
    for shade in (1, 2):
        obstore.put(bucket, f"sets/my birds.{ending}", packed(shade, mode=mode))
        file.write_bytes(packed(shade, mode=mode))
        digests.append(load(images(uri), access).digest)
        assert digests[-1] == load(images(str(file)), access).digest == load(images(uri), access).digest
    assert digests[0] != digests[1]
    assert len(files_of(tmp_path / "converted" / "objects")) == 2
    for wrong, says in (
        ("s3://birds/other/a.tar", "outside the buckets"),
        ("s3://birds/sets/none.tar", "no such object"),
    ):
        with pytest.raises(DatasetError, match=says):
            load(images(wrong), access)
    obstore.put(bucket, "sets/bad.zip", b"no archive")
    with pytest.raises(DatasetError) as caught:
        load(images("s3://birds/sets/bad.zip"), access)
    assert SECRET not in str(caught.value)


class Answer(NamedTuple):
    status: int
    body: str


@pytest.fixture
def refusing(cloud: pytest.MonkeyPatch) -> Iterator[list[Answer]]:
    """A server in place of S3 that answers as told, and says more than it should."""
    answers: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            answer = answers[0]
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body.encode())

        def log_message(self, format: str, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    cloud.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_bucket_that_gives_no_access_is_said_without_a_secret(
    refusing: list[Answer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = f"<Error><AWSAccessKeyId>{KEY}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign></Error>"
    for status in (401, 403):
        refusing[:] = [Answer(status, told)]
        with pytest.raises(DatasetError, match="gives no access") as caught:
            fetch_object(BIRDS, tmp_path)
        error = caught.value
        assert error.__suppress_context__ and error.__cause__ is None
        assert "credentials" in error.problems[0].hint
        assert not any(secret in str(error) + caplog.text for secret in (KEY, SECRET))


def test_bucket_that_does_not_answer_is_no_fault_of_the_user(
    refusing: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "RETRIES", 0)
    refusing[:] = [Answer(500, f"<Error>{SECRET}</Error>")]
    with pytest.raises(StorageError, match="does not answer") as caught:
        fetch_object(BIRDS, tmp_path)
    assert caught.value.problems[0].field == "dataset.uri" and SECRET not in str(caught.value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(StorageError, match="Account must be specified"):
        fetch_object(place_of("az://birds/a.tar"), tmp_path)
