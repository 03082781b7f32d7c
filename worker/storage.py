"""The storage root: one interface for a local folder, s3://, gs://, az:// and memory://, on obstore. Light.

Results are immutable and have one commit: files go to `objects/` first, then `results/<key>.json` is created only if it
is absent, which is one call on every backend. Whoever comes second keeps the first result. Readers verify sha256 sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url
from pydantic import ValidationError

from ncfm_core.errors import StorageError
from worker.records import FileRecord, Record, StageResult, result_path

R = TypeVar("R", bound=Record)

CHUNK_BYTES = 1 << 20


class Storage:
    """Objects by path below one root.

    Raises:
        StorageError: the root cannot be opened, or an object cannot be written or read; a missing object is `None`
            where a method says so.
    """

    def __init__(self, url: str) -> None:
        """Open the root, creating a local folder where it is missing."""
        self.url = url
        self._store = _open(url)

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
            obstore.put(self._store, path, file)
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
            yield bytes(obstore.get_range(self._store, path, start=at, end=min(at + CHUNK_BYTES, end)))

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
        try:
            batches = obstore.list(self._store, prefix=prefix)
            return sorted(str(meta["path"]) for batch in batches for meta in batch)
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
            StorageError: it is missing or differs from its record.
        """
        data = self.get(record.path)
        if data is None:
            raise StorageError.of("storage", record.path, "a committed file is missing", "Its result will be rebuilt.")
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise StorageError.of("storage", record.path, "a committed file is damaged", "Its result will be rebuilt.")
        return data

    def commit(self, result: StageResult) -> StageResult:
        """Make a result the one of its key, unless another was first; returns the one that counts."""
        path = result_path(result.key)
        if self.create_record(path, result):
            return result
        first = self.get_record(path, StageResult)
        assert first is not None
        return first

    def find_result(self, key: str) -> StageResult | None:
        """The committed result of a key whose files are all there with the right sums, or None.

        A damaged result is taken out of the way, so that it can be built again.
        """
        path = result_path(key)
        try:
            result = self.get_record(path, StageResult)
            for file in result.files if result else ():
                self.read_file(file)
        except StorageError:
            if self.get(path) is not None:
                self.delete([path])
            return None
        return result

    def _failed(self, path: str, what: str, error: Exception) -> StorageError:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return StorageError.of("storage", f"{self.url}/{path}", f"{what}: {first_line[:200]}", "Check NCFM_STORAGE.")


def _encode(record: Record) -> bytes:
    return record.model_dump_json(indent=1).encode() + b"\n"


def _open(url: str) -> ObjectStore:
    if url.startswith("memory://"):
        return MemoryStore()
    try:
        if "://" not in url:
            folder = Path(url).expanduser().absolute()
            folder.mkdir(parents=True, exist_ok=True)
            return LocalStore(folder)
        return from_url(url)
    except (BaseError, OSError, ValueError) as error:
        hint = "Name a folder or s3://bucket/prefix."
        raise StorageError.of("storage", url, f"cannot be opened: {error}", hint) from error
