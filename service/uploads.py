"""Uploaded archives: spooled to a file without a name, looked into, and committed under the sha256 of their bytes.

Until the commit nothing of an upload has a name, so whatever happens to the process, the system takes back what was written.

Whoever sends bytes that are here already gets a claim of its own to them. A claim is removed by its owner; with the last one
the upload is gone, and then its bytes. Bytes are looked for and removed under the upload's lock alone (`_lock`), so that no
upload that is there ever lacks them: a commit counts only if the bytes lie there under the lock, and else writes them again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from pydantic import JsonValue
from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, text, update

from ncfm_core.catalog import DatasetFacts
from ncfm_core.errors import NcfmError, StorageError
from service.database import Database, insert_missing
from service.jobs import State
from service.tables import jobs, upload_claims, uploads
from worker.locations import UPLOAD, upload_path
from worker.records import now
from worker.storage import Storage

LOCAL_MODE = 0o644
"""Of an upload's file: workers of another user read it."""
PAGE = 200
COMMIT_TRIES = 5
"""Of keeping an upload whose bytes are removed each time before it counts."""


class NoRoom(NcfmError):
    """An upload finds no room."""

    code = "storage_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An archive that was taken."""

    id: str
    """sha256 of its bytes, in hex."""
    owner: str
    """Of the oldest claim."""
    name: str
    """As that owner gave it; for people alone."""
    size: int
    facts: dict[str, JsonValue]
    """`kind`, `classes` and the rest of what was found in it (service.archives.ArchiveFacts)."""
    created_at: datetime
    deleted_at: datetime | None = None
    owners: tuple[str, ...] = ()
    """Of all claims, the oldest first."""

    @property
    def uri(self) -> str:
        """What a spec names it by."""
        return UPLOAD + self.id

    @property
    def classes(self) -> dict[str, tuple[int, int]]:
        """Images of each class, for training and for testing."""
        classes: Any = self.facts["classes"]
        return {name: (int(train), int(test)) for name, (train, test) in classes.items()}

    @property
    def smallest_class(self) -> int:
        """Training images of the smallest class."""
        return min(train for train, _ in self.classes.values())

    def refine(self, facts: DatasetFacts) -> DatasetFacts:
        """What a spec says of the data, with the numbers that were counted when they were taken."""
        train, test = zip(*self.classes.values(), strict=True)
        return replace(
            facts,
            num_classes=len(self.classes),
            num_train=sum(train),
            num_test=sum(test),
            smallest_class=self.smallest_class,
            assumed=False,
        )

    @property
    def path(self) -> str:
        return upload_path(self.id, f".{self.facts['kind']}")


class Uploads:
    """The uploads of one database and storage root.

    Raises:
        StoreError: by every method, when the database cannot be used.
        StorageError: by those that touch files, when the storage root cannot be.
    """

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database, self._storage = database, storage
        self._folder = None if "://" in storage.url else Path(storage.url) / "uploads"

    def spool(self, size: int | None) -> IO[bytes]:
        """A file without a name, where an upload of so many bytes may go.

        Raises:
            NoRoom: they are more than there is room for.
        """
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)
            free = os.fstatvfs(file.fileno())
        except OSError as error:
            raise no_room(error) from error
        if size is not None and size > free.f_bavail * free.f_frsize:
            file.close()
            raise NoRoom.of("body", f"{size} bytes", "there is no room for it", "Make room in the storage root.")
        return file

    def commit(self, upload: Upload, file: IO[bytes]) -> Upload:
        """Keep an upload for its owner, with its bytes first; one that was deleted comes back, one that is there stays.

        Raises:
            StorageError: its bytes went away again and again.
        """
        for _ in range(COMMIT_TRIES):
            if not self.is_stored(upload):
                self._keep(upload.path, file)
            with self._database.writing() as connection:
                _lock(connection, upload.id)
                if self.is_stored(upload):
                    return _claim(connection, upload)
        raise StorageError.of("body", upload.id, "its bytes are removed as fast as they are kept", "Send it again.")

    def _keep(self, path: str, file: IO[bytes]) -> None:
        file.flush()
        if self._folder is not None:
            try:
                _name(file, self._folder / path.rpartition("/")[2])
                return
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise no_room(error) from error
                # No /proc, or a file system that cannot give a name to a nameless file: copy it.
        file.seek(0)
        self._storage.put_file(path, file)

    def get(self, upload_id: str) -> Upload | None:
        """An upload whose bytes are there; None where there is none, or it was deleted."""
        with self._database.reading() as connection:
            row = connection.execute(
                select(uploads).where(uploads.c.id == upload_id, uploads.c.deleted_at.is_(None))
            ).one_or_none()
            return None if row is None else _with_owners(connection, [row])[0]

    def is_stored(self, upload: Upload) -> bool:
        return self._storage.size(upload.path) == upload.size

    def page(self, *, limit: int, after: str | None) -> list[Upload] | None:
        """Uploads, newest first; those that follow one, where its id is given. None where there never was that one."""
        query = select(uploads).where(uploads.c.deleted_at.is_(None))
        query = query.order_by(uploads.c.created_at.desc(), uploads.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            if after is not None:
                last = connection.execute(select(uploads).where(uploads.c.id == after)).one_or_none()
                if last is None:
                    return None
                same = and_(uploads.c.created_at == last.created_at, uploads.c.id < after)
                query = query.where(or_(uploads.c.created_at < last.created_at, same))
            return _with_owners(connection, connection.execute(query).all())

    def release(self, upload: Upload, owners: Collection[str]) -> None:
        """Remove the claims of some owners; with the last one the upload goes, and then its bytes.

        A process that dies between the two leaves bytes that no upload names: `ncfm gc` takes them.
        """
        claims, this = upload_claims, uploads.c.id == upload.id
        with self._database.writing() as connection:
            _lock(connection, upload.id)
            connection.execute(delete(claims).where(claims.c.upload_id == upload.id, claims.c.owner.in_(owners)))
            rest = _claims(connection, [upload.id]).get(upload.id)
            if rest:
                connection.execute(update(uploads).where(this).values(owner=rest[0].owner, name=rest[0].name))
                return
            connection.execute(update(uploads).where(this).values(deleted_at=now()))
        # Asked before the lock is taken: a storage root that is away must not hold up every writer of SQLite.
        if self._storage.size(upload.path) is not None:
            remove_unnamed(self._database, self._storage, upload.id, upload.path)


def remove_unnamed(database: Database, storage: Storage, upload_id: str, path: str) -> bool:
    """Remove bytes unless an upload that is there has them; whether they were removed."""
    with database.writing() as connection:
        _lock(connection, upload_id)
        named = select(uploads.c.id).where(uploads.c.id == upload_id, uploads.c.deleted_at.is_(None))
        if connection.execute(named).first() is not None:
            return False
        storage.delete([path])
    return True


def user_of(database: Database, upload: Upload) -> tuple[str, str] | None:
    """Id and state of a job that has not ended and needs the upload.

    Rows are not read as jobs: one that this release cannot read, and whose data nobody can tell, may need it too.
    """
    has_ended = jobs.c.state.in_([state for state in State if state.is_terminal])
    query = select(jobs.c.id, jobs.c.state, jobs.c.spec).where(
        jobs.c.dataset == "imagefolder", ~has_ended, jobs.c.deleted_at.is_(None)
    )
    with database.reading() as connection:
        for row in connection.execution_options(yield_per=PAGE).execute(query):
            dataset = row.spec.get("dataset") if isinstance(row.spec, dict) else None
            if not isinstance(dataset, dict) or dataset.get("uri") == upload.uri:
                return row.id, row.state
    return None


def no_room(error: OSError) -> NoRoom:
    """What the storage root says when it takes no more."""
    hint = "Make room in the storage root (NCFM_STORAGE), or in the folder of temporary files."
    return NoRoom.of("body", None, f"it cannot be written: {error.strerror}", hint)


def _name(file: IO[bytes], target: Path) -> None:
    """Give a nameless file its name, durably; nothing happens where that name is taken, since the bytes are the same."""
    os.fchmod(file.fileno(), LOCAL_MODE)
    os.fsync(file.fileno())
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        # A folder is named, though the path is absolute: only then does Python follow the link, which is what it takes.
        os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=folder, follow_symlinks=True)
        os.fsync(folder)
    except FileExistsError:
        if target.stat().st_size != os.fstat(file.fileno()).st_size:
            raise
    finally:
        os.close(folder)


def _lock(connection: Connection, upload_id: str) -> None:
    """Hold an upload until the end of the transaction, also one that has no row yet. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(upload_id.encode()).digest()[:8], "big", signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _claim(connection: Connection, upload: Upload) -> Upload:
    """Write down that its owner has sent an upload, whose lock is held; the upload as it then is."""
    row = connection.execute(select(uploads).where(uploads.c.id == upload.id)).one_or_none()
    values = {name: getattr(upload, name) for name in uploads.c.keys()}
    if row is None:
        connection.execute(insert(uploads).values(values))
    elif row.deleted_at is not None:
        connection.execute(update(uploads).where(uploads.c.id == upload.id).values(values))
    claim = {"owner": upload.owner, "name": upload.name, "created_at": now()}
    insert_missing(connection, upload_claims, upload_id=upload.id, **claim)
    row = connection.execute(select(uploads).where(uploads.c.id == upload.id)).one()
    return _with_owners(connection, [row])[0]


def _claims(connection: Connection, ids: Collection[str]) -> dict[str, list[Row[Any]]]:
    """Claims by upload, the oldest first."""
    query = select(upload_claims).where(upload_claims.c.upload_id.in_(ids))
    found: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in connection.execute(query.order_by(upload_claims.c.created_at, upload_claims.c.owner)):
        found[row.upload_id].append(row)
    return found


def _with_owners(connection: Connection, rows: Collection[Row[Any]]) -> list[Upload]:
    claims = _claims(connection, [row.id for row in rows])
    owners = {row.id: tuple(str(claim.owner) for claim in claims.get(row.id, ())) for row in rows}
    return [replace(Upload(**row._asdict()), owners=owners[row.id]) for row in rows]
