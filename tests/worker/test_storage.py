"""One contract, held against the local folder and its twin in memory."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ncfm_core.errors import DamagedError, StorageError, StorageFullError
from worker.records import FileRecord, StageResult, damaged_path, now, object_folder, result_path
from worker.storage import Storage

KEY = "sha256:" + "a" * 64


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage("memory://" if request.param == "memory" else str(tmp_path))


def result(storage: Storage, built_by: str, data: bytes = b"numbers") -> StageResult:
    return StageResult(
        key=KEY,
        stage="distill",
        built_by=built_by,
        created_at=now(),
        files=storage.write_files(object_folder(built_by, "distill", KEY), {"images.bin": data, "grids/0.png": b"png"}),
        figures={"steps": 3},
        seconds=1.5,
        environment={"threads": 2},
    )


def test_object_is_read_back_and_replaced(storage: Storage) -> None:
    storage.put("a/b.txt", b"one")
    storage.put("a/b.txt", b"three")
    assert storage.get("a/b.txt") == b"three"
    assert storage.size("a/b.txt") == 5


def test_create_keeps_what_was_first(storage: Storage) -> None:
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.get("x") == b"first"


def test_missing_object_is_none(storage: Storage) -> None:
    assert storage.get("nothing") is None
    assert storage.size("nothing/here") is None
    assert storage.list("nothing") == []
    assert storage.get_record("nothing", StageResult) is None
    storage.delete(["nothing"])


def test_list_is_sorted_and_deep(storage: Storage) -> None:
    for path in ("f/b", "f/a/1", "f/c", "g/d"):
        storage.put(path, b"")
    assert storage.list("f") == ["f/a/1", "f/b", "f/c"]


def test_stream_gives_a_range_in_chunks(storage: Storage) -> None:
    data = bytes(range(256)) * 10_000
    storage.put("large", data)
    assert b"".join(storage.stream("large", start=1000, end=2_000_000)) == data[1000:2_000_000]
    assert max(len(chunk) for chunk in storage.stream("large")) <= 1 << 20


def test_committed_result_is_found_whole(storage: Storage) -> None:
    committed = storage.commit(result(storage, "job-1"))
    found = storage.find_result(KEY)
    assert found == committed
    assert [file.name for file in found.files] == ["grids/0.png", "images.bin"]
    assert storage.read_file(found.files[1]) == b"numbers"


def test_second_commit_returns_the_first(storage: Storage) -> None:
    storage.commit(result(storage, "job-1", b"mine"))
    counted = storage.commit(result(storage, "other-1", b"theirs"))
    assert counted.built_by == "job-1"


def test_one_wins_when_many_commit_at_once(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(lambda i: storage.commit(result(storage, f"job-{i}")).built_by, range(8)))
    assert len(set(counted)) == 1
    found = storage.find_result(KEY)
    assert found is not None
    assert found.built_by == counted[0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_result_is_not_found_and_can_be_built_again(storage: Storage, damage: str) -> None:
    path = storage.commit(result(storage, "job-1")).files[1].path
    if damage == "gone":
        storage.delete([path])
    else:
        storage.put(path, b"numbexs" if damage == "flipped" else b"num")
    with pytest.raises(DamagedError, match=r"damaged|missing") as told:
        storage.find_result(KEY, read=True)
    assert told.value.path == path
    storage.set_aside(KEY)
    assert storage.find_result(KEY) is None
    assert storage.list("damaged") == [damaged_path(KEY, 1)]
    assert storage.commit(result(storage, "job-2")).built_by == "job-2"
    assert storage.find_result(KEY, read=True) is not None


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_sizes_are_verified_when_a_result_is_found(storage: Storage, damage: str) -> None:
    path = storage.commit(result(storage, "job-1")).files[1].path
    storage.delete([path])
    if damage == "cut":
        storage.put(path, b"num")
    with pytest.raises(DamagedError):
        storage.find_result(KEY)


def test_result_that_is_whole_is_not_set_aside(storage: Storage) -> None:
    """Whoever saw the damage last finds the result built anew."""
    storage.commit(result(storage, "job-1"))
    storage.set_aside(KEY)
    assert storage.find_result(KEY) is not None
    assert storage.list("damaged") == []


def test_manifest_that_is_no_manifest_is_set_aside_each_time(storage: Storage) -> None:
    for number in (1, 2):
        storage.put(result_path(KEY), b"{ half a")
        with pytest.raises(DamagedError, match="not readable"):
            storage.find_result(KEY)
        storage.set_aside(KEY)
        assert storage.find_result(KEY) is None
        assert storage.get(damaged_path(KEY, number)) == b"{ half a"


def test_full_storage_is_an_error_of_its_own(small_disk: Callable[[str], Path]) -> None:
    """A real file system without room, where this process may mount one."""
    disk = small_disk("64k")
    storage = Storage(str(disk))
    storage.put("kept", b"before")
    for write in (storage.put, storage.create):
        with pytest.raises(StorageFullError, match="full"):
            write("large", bytes(100_000))
    with pytest.raises(StorageFullError):
        storage.put("kept", bytes(100_000))
    assert storage.sizes() == {"kept": 6}
    assert storage.get("kept") == b"before"


def test_reading_a_damaged_file_says_which(storage: Storage) -> None:
    storage.put("f", b"two")
    record = FileRecord(name="f", path="f", size=3, sha256=hashlib.sha256(b"one").hexdigest())
    with pytest.raises(StorageError, match="damaged"):
        storage.read_file(record)


def test_reader_ignores_keys_of_a_newer_writer(storage: Storage) -> None:
    text = result(storage, "job-1").model_dump_json()
    storage.put("r", (text[:-1] + ', "from_the_future": [1]}').encode())
    assert storage.get_record("r", StageResult) is not None


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        Storage(str(tmp_path / "file" / "inside"))


def test_unknown_scheme_is_told() -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        Storage("nowhere://bucket")


@pytest.mark.parametrize("change", ["gone", "cut"])
def test_stream_that_breaks_off_says_so(storage: Storage, change: str) -> None:
    storage.put("large", bytes(3 << 20))
    chunks = storage.stream("large")
    next(chunks)
    if change == "gone":
        storage.delete(["large"])
    else:
        storage.put("large", b"short")
    with pytest.raises(StorageError, match="cannot be read to its end"):
        list(chunks)


@pytest.mark.parametrize("read", [lambda storage: storage.get("a"), lambda storage: storage.size("a")])
def test_bucket_that_never_answers_is_given_up_on_in_time(
    read: Callable[[Storage], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        named = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
        for name, value in (named | {"ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        storage, started = Storage("s3://bucket/prefix", patience=0.5), time.monotonic()
        with pytest.raises(StorageError, match="cannot be read"):
            read(storage)
        # Not at once: the server is called, although the address has no TLS.
        assert 0.4 < time.monotonic() - started < 10
