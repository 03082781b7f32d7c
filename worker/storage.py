"""The storage root: one interface for a local folder, s3://, gs://, az:// and memory://, on obstore. Light.

Results are immutable and have one commit: files go to `objects/` first, then `results/<key>.json` is created only if it
is absent, which is one call on every backend. Whoever comes second keeps the first result. Sizes are verified when a result is
found, sha256 sums when a file is read; what fails either is taken out of the way (`set_aside`), so that it can be built again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url
from pydantic import ValidationError

from ncfm_core.errors import DamagedError, Problem, StorageError, StorageFullError
from worker.records import FileRecord, Record, StageResult, damaged_path, result_path
from worker.settings import http_options

R = TypeVar("R", bound=Record)

CHUNK_BYTES = 1 << 20
NO_ROOM = ("No space left on device", "(os error 28)", "Disk quota exceeded", "(os error 122)", "QuotaExceeded")
"""What backends say when there is none."""


class Storage:
    """Objects by path below one root.

    Raises:
        StorageError: the root cannot be opened, or an object cannot be written or read; a missing object is `None`
            where a method says so.
    """

    def __init__(self, url: str, *, is_look: bool = False, patience: float | None = None) -> None:
        """Open the root, creating a local folder where it is missing.

        Args:
            url: of the root, or a folder.
            is_look: whether it is only to be looked at.
            patience: seconds without a byte after which a request has failed, and after which none is tried again: one
                takes twice that at most. None for obstore's own, three minutes in all; files (`put_file`) always have that.
        """
        self.url = url
        self._store = _open(url, is_look=is_look, patience=patience)
        # A part of a large file may take its time on a slow line.
        self._patient = (
            self._store if patience is None or not _is_remote(url) else _open(url, is_look=is_look, patience=None)
        )

    def put(self, path: str, data: bytes) -> None:
        """Write an object, replacing what is there; readers see the old or the new one, never a part."""
        try:
            obstore.put(self._store, path, data)
        except (BaseError, OSError) as error:
            raise self._failed(path, "cannot be written", error) from error

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only if there is none; whether it was written."""
        try:
            obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self._failed(path, "cannot be written", error) from error
        return True

    def put_file(self, path: str, file: IO[bytes]) -> None:
        """Write an object from an open file, part by part; readers see all of it or nothing."""
        try:
            obstore.put(self._patient, path, file)
        except (BaseError, OSError) as error:
            raise self._failed(path, "cannot be written", error) from error

    def get(self, path: str) -> bytes | None:
        """The object, or None."""
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise self._failed(path, "cannot be read", error) from error

    def stream(self, path: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) of an object in chunks of about a MiB, so that memory does not grow with it."""
        size = self.size(path)
        if size is None:
            raise StorageError.of("storage", path, "there is no such object", "It may have been removed by hand.")
        end = size if end is None else min(end, size)
        for at in range(start, end, CHUNK_BYTES):
            try:
                chunk = bytes(obstore.get_range(self._store, path, start=at, end=min(at + CHUNK_BYTES, end)))
            except (BaseError, OSError) as error:
                raise self._failed(path, "cannot be read to its end", error) from error
            yield chunk

    def size(self, path: str) -> int | None:
        """Bytes of the object, or None."""
        try:
            return int(obstore.head(self._store, path)["size"])
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise self._failed(path, "cannot be read", error) from error

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below a folder, sorted."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of all objects below a folder, or below the root, by path."""
        try:
            batches = obstore.list(self._store, prefix=prefix or None)
            return {str(meta["path"]): int(meta["size"]) for batch in batches for meta in batch}
        except (BaseError, OSError) as error:
            raise self._failed(prefix, "cannot be listed", error) from error

    def entries(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """Path, bytes and time of the last change of each object below a folder, in no order."""
        try:
            for batch in obstore.list(self._store, prefix=prefix):
                for meta in batch:
                    yield str(meta["path"]), int(meta["size"]), meta["last_modified"]
        except (BaseError, OSError) as error:
            raise self._failed(prefix, "cannot be listed", error) from error

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects; missing ones are no error."""
        for path in paths:
            try:
                obstore.delete(self._store, path)
            except (NotFoundError, FileNotFoundError):
                continue
            except (BaseError, OSError) as error:
                raise self._failed(path, "cannot be removed", error) from error

    def put_record(self, path: str, record: Record) -> None:
        self.put(path, _encode(record))

    def create_record(self, path: str, record: Record) -> bool:
        return self.create(path, _encode(record))

    def get_record(self, path: str, kind: type[R]) -> R | None:
        """The document, or None where there is none.

        Raises:
            StorageError: it is there but is not such a document.
        """
        data = self.get(path)
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise StorageError.of(path, None, f"not a {kind.__name__}: {error.errors()[0]['msg']}", "") from None

    def write_files(self, folder: str, files: Mapping[str, bytes]) -> tuple[FileRecord, ...]:
        """Write files below a folder, to be named in a commit later."""
        records = []
        for name, data in sorted(files.items()):
            path = f"{folder}/{name}"
            self.put(path, data)
            records.append(FileRecord(name=name, path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        return tuple(records)

    def read_file(self, record: FileRecord) -> bytes:
        """A file of a commit, verified.

        Raises:
            DamagedError: it is missing or differs from its record.
        """
        data = self.get(record.path)
        if data is None:
            raise _damaged(record.path, "a committed file is missing")
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise _damaged(record.path, "a committed file is damaged")
        return data

    def commit(self, result: StageResult) -> StageResult:
        """Make a result the one of its key, unless another was first; returns the one that counts."""
        path = result_path(result.key)
        if self.create_record(path, result):
            return result
        first = self.get_record(path, StageResult)
        assert first is not None
        return first

    def find_result(self, key: str, *, read: bool = False) -> StageResult | None:
        """The committed result of a key, or None.

        Args:
            key: of the result.
            read: also verify the sums of its files, for which they are read.

        Raises:
            DamagedError: there is one, but it cannot be used.
        """
        path = result_path(key)
        data = self.get(path)
        if data is None:
            return None
        try:
            result = StageResult.model_validate_json(data)
        except ValidationError:
            raise _damaged(path, "a committed result is not readable") from None
        for file in result.files:
            if read:
                self.read_file(file)
            elif (size := self.size(file.path)) != file.size:
                raise _damaged(file.path, f"a committed file is {'missing' if size is None else 'damaged'}")
        return result

    def set_aside(self, key: str) -> None:
        """Take a result that is damaged out of the way, unless another did or built it anew; its record stays to be looked at."""
        path = result_path(key)
        try:
            if self.find_result(key, read=True) is not None:
                return
        except DamagedError:
            data, number = self.get(path), 1
            while data is not None and not self.create(damaged_path(key, number), data):
                number += 1
            self.delete([path])

    def _failed(self, path: str, what: str, error: Exception) -> StorageError:
        text = str(error)
        first_line = text.splitlines()[0] if text else type(error).__name__
        if any(words in text for words in NO_ROOM):
            hint = "Make room: `ncfm gc` lists what nothing needs."
            return StorageFullError.of("storage", f"{self.url}/{path}", f"{what}: the storage is full", hint)
        return StorageError.of("storage", f"{self.url}/{path}", f"{what}: {first_line[:200]}", "Check NCFM_STORAGE.")


def _damaged(path: str, what: str) -> DamagedError:
    return DamagedError(Problem(path, "", what, "Its result is built again."))


def _encode(record: Record) -> bytes:
    return record.model_dump_json(indent=1).encode() + b"\n"


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("memory:", "file:"))


def _open(url: str, *, is_look: bool, patience: float | None) -> ObjectStore:
    if url.startswith("memory://"):
        return MemoryStore()
    try:
        if "://" not in url:
            folder = Path(url).expanduser().absolute()
            if not is_look:
                folder.mkdir(parents=True, exist_ok=True)
            elif not folder.is_dir():
                hint = "Name the one you mean with NCFM_HOME or NCFM_STORAGE; the start of the service makes a new one."
                raise StorageError.of("NCFM_STORAGE", str(folder), "there is no storage root here", hint)
            return LocalStore(folder)
        if patience is None or not _is_remote(url):
            return from_url(url)
        limit = timedelta(seconds=patience)
        options = {**http_options(), "connect_timeout": limit, "read_timeout": limit}
        return from_url(url, client_options=options, retry_config={"retry_timeout": limit})  # type: ignore[call-overload,no-any-return]
    except (BaseError, OSError, ValueError) as error:
        hint = "Name a folder or s3://bucket/prefix."
        raise StorageError.of("storage", url, f"cannot be opened: {error}", hint) from error
