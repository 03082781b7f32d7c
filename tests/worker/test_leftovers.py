"""What is listed for deletion, and what never is."""

from __future__ import annotations

import pytest

from ncfm_core.errors import StorageError
from worker.leftovers import (
    checkpoints_of,
    checkpoints_without_job,
    damaged_results,
    partial_files,
    unreferenced_objects,
)
from worker.records import StageResult, now, object_folder, result_path
from worker.storage import Storage

KEYS = tuple(f"sha256:{digit * 64}" for digit in "abc")


def result(storage: Storage, job: str, key: str) -> StageResult:
    built_by = f"{job}-1"
    return StageResult(
        key=key,
        stage="teachers",
        built_by=built_by,
        created_at=now(),
        files=storage.write_files(object_folder(built_by, "teachers", key), {"weights.safetensors": b"12345"}),
        figures={},
        seconds=1.0,
        environment={},
    )


@pytest.fixture
def storage() -> Storage:
    return Storage("memory://")


def test_objects_that_a_result_refers_to_are_needed_whoever_made_them(storage: Storage) -> None:
    storage.commit(result(storage, "over", KEYS[0]))
    assert unreferenced_objects(storage, set()) == []


def test_objects_without_a_result_are_listed_unless_their_job_may_go_on(storage: Storage) -> None:
    lost, live = result(storage, "lost-1", KEYS[0]), result(storage, "live", KEYS[1])
    (found,) = unreferenced_objects(storage, {"live"})
    assert (found.path, found.size) == (lost.files[0].path, 5)
    assert {each.path for each in unreferenced_objects(storage, set())} == {lost.files[0].path, live.files[0].path}


def test_objects_that_came_second_are_listed(storage: Storage) -> None:
    first, second = result(storage, "first", KEYS[0]), result(storage, "second", KEYS[0])
    storage.commit(first)
    storage.commit(second)
    assert [each.path for each in unreferenced_objects(storage, set())] == [second.files[0].path]


def test_damaged_result_is_listed_with_its_objects(storage: Storage) -> None:
    made = storage.commit(result(storage, "over", KEYS[0]))
    storage.put(made.files[0].path, b"123")
    storage.set_aside(KEYS[0])
    assert [each.size for each in unreferenced_objects(storage, set())] == [3]
    assert len(damaged_results(storage)) == 1


def test_nothing_is_listed_while_a_result_cannot_be_read(storage: Storage) -> None:
    result(storage, "lost", KEYS[0])
    storage.put(result_path(KEYS[1]), b"{")
    with pytest.raises(StorageError):
        unreferenced_objects(storage, set())


def test_checkpoints_are_listed_by_job(storage: Storage) -> None:
    for job in ("one", "two"):
        storage.put(f"checkpoints/{job}/abc/1/0000000020.json", b"{}")
    assert [each.path for each in checkpoints_of(storage, "one")] == ["checkpoints/one/abc/1/0000000020.json"]
    assert [each.path for each in checkpoints_without_job(storage, {"one"})] == [
        "checkpoints/two/abc/1/0000000020.json"
    ]
    assert checkpoints_of(storage, "on") == []


def test_partial_files_are_listed_wherever_they_are(storage: Storage) -> None:
    for path in ("uploads/a.partial", "jobs/J/b.partial", "jobs/J/c"):
        storage.put(path, b"12")
    assert [(each.path, each.size) for each in partial_files(storage)] == [
        ("jobs/J/b.partial", 2),
        ("uploads/a.partial", 2),
    ]
