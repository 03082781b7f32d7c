"""Uploads on both engines: several owners of the same bytes, and commits, deletes and sweeps that cross each other."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import JsonValue
from sqlalchemy import text

from ncfm_core.errors import StorageError
from service.database import open_unchecked
from service.retention import Limits, sweep_storage
from service.schema import downgrade, upgrade
from service.store import Store
from service.uploads import Upload, Uploads, remove_unnamed
from worker.records import now
from worker.storage import Storage

DATA = b"an archive"
ID = hashlib.sha256(DATA).hexdigest()
PATH = f"uploads/{ID}.zip"


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


class Crossed(Storage):
    """A storage root where something else happens once, just after the size of an object was read."""

    def __init__(self, url: str, then: Callable[[], object]) -> None:
        super().__init__(url)
        self._then: list[Callable[[], object]] = [then]

    def size(self, path: str) -> int | None:
        found = super().size(path)
        if self._then:
            self._then.pop()()
        return found


def commit(uploads: Uploads, owner: str, name: str = "birds") -> Upload:
    facts: dict[str, JsonValue] = {"kind": "zip"}
    upload = Upload(id=ID, owner=owner, name=name, size=len(DATA), facts=facts, created_at=now())
    with uploads.spool(len(DATA)) as file:
        file.write(DATA)
        return uploads.commit(upload, file)


def test_upload_of_two_owners_goes_with_the_last(store: Store, storage: Storage) -> None:
    uploads = Uploads(store, storage)
    assert commit(uploads, "ann", "of ann").owners == ("ann",)
    assert commit(uploads, "bob", "of bob").owners == ("ann", "bob")
    both = commit(uploads, "ann", "again")
    assert (both.owners, both.owner, both.name) == (("ann", "bob"), "ann", "of ann")
    uploads.release(both, ["ann"])
    left = uploads.get(ID)
    assert left is not None and (left.owners, left.owner, left.name) == (("bob",), "bob", "of bob")
    assert storage.get(PATH) == DATA
    uploads.release(left, ["carl"])
    assert storage.get(PATH) == DATA, "who has no claim removes nothing"
    [listed] = uploads.page(limit=5, after=None) or []
    assert listed == left
    uploads.release(left, ["bob"])
    assert uploads.get(ID) is None and storage.get(PATH) is None and uploads.page(limit=5, after=None) == []
    assert commit(uploads, "bob").owners == ("bob",)
    assert storage.get(PATH) == DATA


def test_commit_when_the_bytes_that_it_found_are_removed_writes_them(store: Store, storage: Storage) -> None:
    first = commit(Uploads(store, storage), "ann")
    crossed = Crossed(storage.url, lambda: Uploads(store, storage).release(first, ["ann"]))
    assert commit(Uploads(store, crossed), "bob").owners == ("bob",)
    assert storage.get(PATH) == DATA


def test_commit_when_the_bytes_go_each_time_says_so(store: Store, storage: Storage) -> None:
    class Leaking(Storage):
        def size(self, path: str) -> int | None:
            return None

    with pytest.raises(StorageError, match="Send it again"):
        commit(Uploads(store, Leaking(storage.url)), "ann")
    assert Uploads(store, storage).get(ID) is None


def test_delete_when_the_upload_comes_back_leaves_its_bytes(store: Store, storage: Storage) -> None:
    first = commit(Uploads(store, storage), "ann")
    crossed = Crossed(storage.url, lambda: commit(Uploads(store, storage), "bob"))
    Uploads(store, crossed).release(first, ["ann"])
    back = Uploads(store, storage).get(ID)
    assert back is not None and back.owners == ("bob",) and storage.get(PATH) == DATA


def test_sweep_when_an_upload_comes_back_leaves_its_bytes(
    store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that a killed delete left are found by the sweep, and by a commit that takes them as they are."""
    storage.put(PATH, DATA)
    file = Path(storage.url, PATH)
    long_ago = (now() - timedelta(days=3)).timestamp()
    os.utime(file, (long_ago, long_ago))

    def late(*arguments: object) -> bool:
        commit(Uploads(store, storage), "ann")
        return remove_unnamed(store, storage, ID, PATH)

    monkeypatch.setattr("service.retention.remove_unnamed", late)
    assert sweep_storage(store, storage, now(), Limits(), dry_run=False).counts == {}
    assert storage.get(PATH) == DATA
    monkeypatch.undo()
    with store.writing() as connection:
        connection.execute(text("UPDATE uploads SET deleted_at = created_at"))
    os.utime(file, (long_ago, long_ago))
    assert sweep_storage(store, storage, now(), Limits(), dry_run=False).counts == {"uploads without a name": 1}
    assert storage.get(PATH) is None


def test_commits_and_deletes_at_once_never_leave_an_upload_without_its_bytes(store: Store, storage: Storage) -> None:
    uploads, lacking = Uploads(store, storage), []

    def work(owner: str) -> None:
        draws = random.Random(owner)
        for _ in range(15):
            with suppress(StorageError):
                upload = commit(uploads, owner)
                # Nobody else removes this owner's claim.
                if not uploads.is_stored(upload):
                    lacking.append(owner)
                if draws.random() < 0.8:
                    uploads.release(upload, [owner])

    threads = [threading.Thread(target=work, args=(owner,)) for owner in ("ann", "bob", "carl")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lacking == []
    left = uploads.get(ID)
    assert (left is not None) == (storage.get(PATH) is not None)


def test_uploads_of_an_older_release_keep_their_owner(database_url: str) -> None:
    database = open_unchecked(database_url)
    row = "INSERT INTO uploads (id, owner, name, size, facts, created_at, deleted_at) VALUES "
    at = "2026-05-01 12:00:00+00" if database.engine.dialect.name == "postgresql" else "2026-05-01 12:00:00"
    with database.writing() as connection:
        upgrade(connection, "0002")
        connection.execute(text(row + f"('a', 'ann', 'of ann', 1, '{{}}', '{at}', NULL)"))
        connection.execute(text(row + f"('b', 'bob', 'of bob', 1, '{{}}', '{at}', '{at}')"))
    database.upgrade()
    database.close()
    with Store(database_url) as store:
        uploads = Uploads(store, Storage("memory://"))
        found = uploads.get("a")
        assert found is not None and (found.owners, found.name) == (("ann",), "of ann")
        assert uploads.get("b") is None
        with store.reading() as connection:
            assert connection.execute(text("SELECT upload_id, owner, name FROM upload_claims")).all() == [
                ("a", "ann", "of ann")
            ]
    database = open_unchecked(database_url)
    with database.writing() as connection:
        downgrade(connection, "0002")
        assert connection.execute(text("SELECT id, owner FROM uploads ORDER BY id")).all() == [
            ("a", "ann"),
            ("b", "bob"),
        ]
    database.close()
