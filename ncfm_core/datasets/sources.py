"""Where image files come from: a folder, a tar or a zip. Archives are read member by member and never unpacked."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, Protocol, cast

from ncfm_core.errors import DatasetError, shorten

MAX_FILES = 5_000_000
"""Of one source."""
MAX_FILE_BYTES = 64 << 20
"""Of one image file, as unpacked."""
MAX_TOTAL_BYTES = 512 << 30
"""Of all members of an archive, as unpacked."""
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError, RuntimeError, ValueError)
"""What reading a damaged archive may raise; NotImplementedError, for an unknown compression, is a RuntimeError."""


class Source(Protocol):
    """Files below one root, by their path in it, with `/` between the parts."""

    where: str
    """For messages."""
    sizes: dict[str, int]
    """Bytes of each file."""
    folders: set[str]
    """Folders that are listed themselves; they may be empty."""
    listing: str
    """Digest that changes when a file is added, removed or changed, by size and time."""

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The files of these paths with their content, in the order that suits the source.

        Raises:
            DatasetError: one is damaged or too large.
        """


def open_source(path: Path) -> Source:
    """The folder or archive at a path.

    Raises:
        DatasetError: there is none, or it is neither, or it is damaged or not safe to read.
    """
    if path.is_dir():
        return Folder(path)
    name = path.name.lower()
    if not path.exists():
        hint = "Give a path that every node of the cluster can read, or a relative one below NCFM_DATA_DIR."
        raise DatasetError.of("dataset.uri", str(path), "there is nothing at that path", hint)
    if not path.is_file() or not name.endswith(ARCHIVES):
        hint = f"Use one of {', '.join(ARCHIVES)}."
        raise DatasetError.of("dataset.uri", str(path), "neither a folder nor an archive", hint)
    return Zip(path) if name.endswith(".zip") else Tar(path)


class Folder:
    """A folder of the file system; links inside it are followed."""

    def __init__(self, root: Path, below: Collection[str] = ("",)) -> None:
        """
        Args:
            root: of all paths.
            below: folders in it that are listed where they exist; nothing else is looked at.
        """
        self._root, self.where = root, str(root)
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        digest = hashlib.sha256(os.fsencode(root))
        for name in sorted(below):
            if (root / name).is_dir():
                for path, size, changed in self._walk(name):
                    self.sizes[path] = size
                    digest.update(os.fsencode(path) + f"\0{size}\0{changed}\n".encode())
        self.listing = digest.hexdigest()

    def _walk(self, top: str) -> Iterator[tuple[str, int, int]]:
        """Path, size and time of every file below a folder, in a fixed order."""
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
        while waiting:
            name, above = waiting.pop()
            try:
                status = (self._root / name).stat()
                entries = sorted(os.scandir(self._root / name), key=lambda entry: entry.name)
            except OSError as error:
                raise _damaged(name or self.where, error) from None
            this = (status.st_dev, status.st_ino)
            if this in above:
                continue  # a link to a folder above would lead round and round
            self.folders.add(name)
            for entry in entries:
                path = f"{name}/{entry.name}" if name else entry.name
                if entry.is_dir():
                    waiting.append((path, above | {this}))
                elif entry.is_file():
                    found = entry.stat()
                    yield path, found.st_size, found.st_mtime_ns
                else:
                    raise _damaged(path, "neither a file nor a folder, or a link to nothing")

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in wanted:
            _check_size(name, self.sizes[name])
            try:
                yield name, (self._root / name).read_bytes()
            except OSError as error:
                raise _damaged(name, error) from None


class Tar:
    """A tar, perhaps compressed with gzip; read from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path)
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.listing = _archive_listing(path)
        total = 0
        for member, _ in self._members():
            name = _safe(member.name, self.where)
            if member.isdir():
                self.folders.add(name)
                continue
            if not member.isreg():
                raise _unsafe(self.where, f"{shorten(name)} is a link or a device")
            total += member.size
            _add(self.sizes, name, member.size, total, self.where)

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
        try:
            with tarfile.open(self._path, "r:*") as archive:
                # Without keeping what has passed: an archive may have millions of members.
                while (member := archive.next()) is not None:
                    yield member, archive
                    cast(Any, archive).members.clear()
                # A header that is cut or damaged reads like the end: only there two blocks of zeros are.
                if archive.fileobj is None or archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it is damaged or ends too early")
        except _DAMAGED as error:
            raise _damaged(self.where, error) from None

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        chosen = set(wanted)
        for member, archive in self._members():
            name = _safe(member.name, self.where)
            if not member.isdir() and name in chosen:
                _check_size(name, member.size)
                try:
                    data = _read(archive.extractfile(member), name, member.size)
                except _DAMAGED as error:
                    raise _damaged(name, error) from None
                yield name, data


class Zip:
    """A zip without a password."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path)
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.listing = _archive_listing(path)
        total = 0
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except _DAMAGED as error:
            raise _damaged(self.where, error) from None
        self._names: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = _safe(member.filename, self.where)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                self.folders.add(name)
                continue
            if kind not in (0, stat.S_IFREG):
                raise _unsafe(self.where, f"{shorten(name)} is a link or a device")
            total += member.file_size
            _add(self.sizes, name, member.file_size, total, self.where)
            self._names[name] = member

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                for name in wanted:
                    _check_size(name, self.sizes[name])
                    try:
                        with archive.open(self._names[name]) as file:
                            data = _read(file, name, self.sizes[name])
                    except _DAMAGED as error:
                        raise _damaged(name, error) from None
                    yield name, data
        except _DAMAGED as error:
            raise _damaged(self.where, error) from None


def _archive_listing(path: Path) -> str:
    found = path.stat()
    return hashlib.sha256(os.fsencode(path) + f"\0{found.st_size}\0{found.st_mtime_ns}".encode()).hexdigest()


def _safe(name: str, where: str) -> str:
    """The path of a member without its `.` parts.

    Raises:
        DatasetError: it leads out of the archive's root.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\\" in name or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise _unsafe(where, f"the member {shorten(name)} leads out of its folder")
    return "/".join(parts)


def _add(sizes: dict[str, int], name: str, size: int, total: int, where: str) -> None:
    if name in sizes:
        raise _unsafe(where, f"{shorten(name)} stands in it twice")
    sizes[name] = size
    if len(sizes) > MAX_FILES:
        raise _unsafe(where, f"it has more than {MAX_FILES} files")
    if total > MAX_TOTAL_BYTES:
        raise _unsafe(where, f"it unpacks to more than {MAX_TOTAL_BYTES >> 30} GiB")


def _read(file: IO[bytes] | None, name: str, size: int) -> bytes:
    data = file.read(size + 1) if file is not None else b""
    if len(data) != size:
        raise _damaged(name, f"{len(data)} bytes instead of {size}")
    return data


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise DatasetError.of(
            "dataset", name, f"an image file of more than {MAX_FILE_BYTES >> 20} MiB", "Shrink it or leave it out."
        )


def _damaged(name: str, reason: object) -> DatasetError:
    # Of several lines, as tarfile has one for each compression that it tried, the first says what is wrong.
    text = next(iter(str(reason).splitlines()), "").rstrip(":") or type(reason).__name__
    return DatasetError.of("dataset", name, f"cannot be read: {text}", "Mend or remove it.")


def _unsafe(where: str, message: str) -> DatasetError:
    return DatasetError.of("dataset.uri", where, f"refused: {message}", "Pack plain files and folders alone.")
