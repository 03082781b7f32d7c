"""A user's own images as an archive in a bucket: which objects may be read, and how one is fetched. Light.

The credentials are those of the machine that reads (the variables of the cloud's own tools); a URI never holds any.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from ncfm_core.errors import DatasetError, StorageError, shorten
from ncfm_core.spec import BUCKET_SCHEMES
from worker.redaction import redact

T = TypeVar("T")

ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
MAX_BYTES = 512 << 30
"""Of an object: what an archive may be unpacked."""
PART_BYTES = 16 << 20
"""Of one request: each has to be answered within half a minute."""
RETRIES = 5
PATIENCE = timedelta(seconds=60)
"""For one request, with all that are made again."""
FETCH_TRIES = 3
"""Of an object that changes while it is read."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_EXAMPLE = "s3://birds/archives"


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket, and a path in it: of an object, or of what objects lie below."""

    scheme: str
    bucket: str
    parts: tuple[str, ...]

    @property
    def key(self) -> str:
        return "/".join(self.parts)

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join((self.bucket, *self.parts))}"

    def is_below(self, prefix: Place) -> bool:
        """Whether it lies there, by whole parts of the path."""
        is_same = (self.scheme, self.bucket) == (prefix.scheme, prefix.bucket)
        return is_same and self.parts[: len(prefix.parts)] == prefix.parts


def is_in_bucket(uri: str) -> bool:
    """Whether a URI is of a bucket."""
    return uri.partition("://")[0] in BUCKET_SCHEMES and "://" in uri


def place_of(uri: str) -> Place:
    """The place that a URI names, letter by letter: nothing in it is decoded or shortened.

    Raises:
        ValueError: it is not plain; says why, without the URI.
    """
    found = _SCHEME.fullmatch(uri)
    if found is None or found[1] not in BUCKET_SCHEMES:
        raise ValueError(f"does not begin with {', '.join(f'{scheme}://' for scheme in BUCKET_SCHEMES)}")
    rest = found[2].removesuffix("/")
    if "@" in rest.partition("/")[0]:
        raise ValueError("holds credentials")
    # Encoded, a key can look as if it lay elsewhere; and what stands after ? or # is no part of a key.
    if any(not letter.isprintable() or letter in "%\\?#" for letter in rest):
        raise ValueError("holds %, ?, # or a backslash, or what cannot be printed")
    bucket, *parts = rest.split("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ValueError("does not name a bucket")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("has an empty part, . or .. in its path")
    return Place(found[1], bucket, tuple(parts))


def allowed_object(uri: str, buckets: Sequence[str]) -> Place:
    """The archive that a URI names, if it lies below one of the prefixes that data may be read from.

    Raises:
        DatasetError: it does not, is not plain, or is no archive.
    """
    try:
        place = place_of(uri)
    except ValueError as error:
        hint = "Write it as s3://bucket/path/birds.tar; credentials belong to the nodes."
        raise DatasetError.of("dataset.uri", redact(uri), str(error), hint) from None
    if not any(place.is_below(place_of(prefix)) for prefix in buckets):
        where = f" Allowed: {', '.join(buckets)}." if buckets else ""
        hint = f"Allow it with NCFM_DATA_BUCKETS, such as {_EXAMPLE}, or upload the data (POST /datasets).{where}"
        raise DatasetError.of("dataset.uri", uri, "lies outside the buckets that data may be read from", hint)
    if not place.parts or uri.endswith("/") or not place.key.lower().endswith(ENDINGS):
        hint = f"Pack the folder into one object ({', '.join(ENDINGS)}) and name that."
        raise DatasetError.of("dataset.uri", uri, "a folder of a bucket is not read, an archive is", hint)
    return place


def fetch_object(place: Place, folder: Path) -> Path:
    """A file with the object as it is now: fetched once for each version of it.

    Args:
        place: of the object, which may be read.
        folder: where the files are.

    Raises:
        DatasetError: there is no such object, it may not be read, or there is no room for it.
        StorageError: the bucket does not answer, or the object changes all the time.
    """
    store = open_bucket(place)
    for _ in range(FETCH_TRIES):
        meta = _asked(place, lambda: obstore.head(store, place.key))
        version = _Version(int(meta["size"]), meta["e_tag"], meta["version"], meta["last_modified"])
        file = folder / version.file_name(place)
        if _is_whole(file, version):
            return file
        with _making(place, file):
            # Another task may have fetched it while this one waited.
            if _is_whole(file, version) or _fetch(store, place, version, file):
                return file
    hint = "Wait until it is written, and give each version a name of its own."
    raise StorageError.of("dataset.uri", str(place), "the object changes while it is read", hint)


@dataclass(frozen=True, slots=True)
class _Version:
    """What tells one content of an object from another."""

    size: int
    e_tag: str | None
    version: str | None
    changed_at: datetime

    def file_name(self, place: Place) -> str:
        mark = (self.e_tag, self.version) if self.e_tag or self.version else (self.changed_at.isoformat(),)
        digest = hashlib.sha256(repr((str(place), self.size, *mark)).encode()).hexdigest()
        return digest + next(each for each in ENDINGS if place.key.lower().endswith(each))


def open_bucket(place: Place) -> ObjectStore:
    """The bucket itself, with the credentials and the endpoint that this process finds in its environment."""
    return _asked(
        place,
        lambda: from_url(
            f"{place.scheme}://{place.bucket}", retry_config={"max_retries": RETRIES, "retry_timeout": PATIENCE}
        ),
    )


def _is_whole(file: Path, version: _Version) -> bool:
    return file.is_file() and file.stat().st_size == version.size


@contextmanager
def _making(place: Place, file: Path) -> Iterator[None]:
    """Let one process of a machine fetch a file; what the disk refuses is said."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("wb") as lock:
            with suppress(OSError):  # not every file system has locks: the file is then fetched twice
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(place, file.parent) from None
        hint = "Let the nodes write there, or name another folder with NCFM_CACHE_DIR."
        raise DatasetError.of("dataset.uri", str(file.parent), f"cannot be written: {error.strerror}", hint) from None


def _fetch(store: ObjectStore, place: Place, version: _Version, file: Path) -> bool:
    """Copy one version of an object into a file, which appears whole or not at all; False where the object has changed."""
    if version.size > MAX_BYTES:
        raise DatasetError.of(
            "dataset.uri", str(place), f"larger than {MAX_BYTES >> 30} GiB", "Pack fewer or smaller images."
        )
    if version.size > shutil.disk_usage(file.parent).free:
        raise _no_room(place, file.parent, version.size)
    draft = None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".object-", suffix=".partial", delete=False) as out:
            draft = Path(out.name)
            for start in range(0, version.size, PART_BYTES):
                part = _part(store, place, version, start)
                if part is None:
                    return False
                out.write(part)
        # The same on every node and each time: what is converted from it is found again.
        changed = version.changed_at.timestamp()
        os.utime(draft, (changed, changed))
        draft.replace(file)
        draft = None
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()
    return True


def _part(store: ObjectStore, place: Place, version: _Version, start: int) -> bytes | None:
    """Some bytes of one version of an object; None where it is not that version any more."""
    end = min(start + PART_BYTES, version.size)

    def ask() -> bytes:
        if version.e_tag:
            answer = obstore.get(store, place.key, options={"range": (start, end), "if_match": version.e_tag})
        else:
            answer = obstore.get(store, place.key, options={"range": (start, end)})
        if (answer.meta["size"], answer.meta["e_tag"]) != (version.size, version.e_tag):
            raise PreconditionError
        return bytes(answer.bytes())

    try:
        part = _asked(place, ask)
    except PreconditionError:
        return None
    return part if len(part) == end - start else None


def _asked(place: Place, ask: Callable[[], T]) -> T:
    """The answer of a bucket. What it says of an error may hold a key or a signature: of that only the kind is told."""
    try:
        return ask()
    except PreconditionError:
        raise
    except (NotFoundError, FileNotFoundError, InvalidPathError):
        hint = "Check bucket and path (letters count), or upload the archive (POST /datasets)."
        raise DatasetError.of("dataset.uri", str(place), "there is no such object", hint) from None
    except (PermissionDeniedError, UnauthenticatedError, PermissionError):
        hint = "Give the nodes that read it credentials for the bucket; a public one needs AWS_SKIP_SIGNATURE=true."
        raise DatasetError.of("dataset.uri", str(place), "the bucket gives no access", hint) from None
    except (BaseError, OSError, ValueError) as error:
        said = shorten(redact(str(error).partition("\n")[0]))
        hint = "Are its endpoint, region and account set on the nodes (docs/datasets.md)?"
        raise StorageError.of("dataset.uri", str(place), f"the bucket does not answer: {said}", hint) from None


def _no_room(place: Place, folder: Path, size: int | None = None) -> DatasetError:
    wanted = "it" if size is None else f"its {size} bytes"
    hint = "Make room, or name another folder with NCFM_CACHE_DIR."
    return DatasetError.of("dataset.uri", str(place), f"there is no room for {wanted} in {folder}", hint)
