"""What is in an uploaded archive, found out in a process of its own: `python -m service.archives tar|tar.gz|zip < archive`.

An archive comes from a stranger, and to look into it takes memory and minutes: here both are bounded, and the API goes on
answering.
Everything that the worker would refuse later is refused now (ncfm_core.datasets has the same rules; it needs numpy, which the
service does without): members that lead out, links, devices, members that stand twice, sizes that nobody could unpack, and images
whose headers cannot be read. The last line of the output is one JSON object: the facts, or an error.
"""

from __future__ import annotations

import json
import re
import resource
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast

from ncfm_core.errors import NcfmError, shorten
from service.image_headers import HEAD_BYTES, SUFFIXES, image_size

Kind = Literal["tar", "tar.gz", "zip"]

MAX_MEMBERS = 1_000_000
MAX_MEMBER_BYTES = 64 << 20
"""Of one image, as unpacked."""
MAX_TOTAL_BYTES = 256 << 30
"""Of all members, as unpacked."""
MAX_RATIO = 200
"""Between unpacked and packed bytes: images hardly shrink, but for blank ones."""
FREE_BYTES = 1 << 30
"""Up to here no ratio is too high."""
MAX_PIXELS = 1 << 27
MAX_CLASSES = 10_000
MAX_NAME_CHARS = 100
MAX_PATH_CHARS = 1000
TRAIN, TEST_NAMES = "train", ("test", "val")
TEST_SHARE = 5
MEMORY_BYTES = 2 << 30
"""Address space of this process."""
CPU_SECONDS = 3600
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError, RuntimeError, ValueError)


class ArchiveRefused(NcfmError):
    """An archive is not safe to read, or holds no classes of images."""

    code = "archive_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveFacts:
    """What an archive holds."""

    classes: dict[str, tuple[int, int]]
    """Name to the numbers of its images for training and for testing; where nobody split them, by the split of ours."""
    split: str
    """`train and test`, `train and val`, or `ours`."""
    ignored_files: int
    unpacked_bytes: int
    largest_image: tuple[int, int]
    """Width and height of the one with most pixels."""


@dataclass(slots=True)
class _Contents:
    """What was seen on the way through."""

    packed_bytes: int
    images: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    total: int = 0
    members: int = 0
    largest: tuple[int, int] = (0, 0)

    def enter(self, name: str, size: int) -> str:
        """The safe path of the next member, counted."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        leads_out = name.startswith("/") or "\\" in name or ".." in parts or re.match(r"[A-Za-z]:", name)
        if leads_out or "\0" in name:
            raise _refused(name, "leads out of its folder")
        if len(name) > MAX_PATH_CHARS:
            raise _refused(name, f"has a path of more than {MAX_PATH_CHARS} characters")
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise _refused("", f"it has more than {MAX_MEMBERS} members")
        self.total += size
        bound = min(MAX_TOTAL_BYTES, max(FREE_BYTES, MAX_RATIO * self.packed_bytes))
        if size < 0 or self.total > bound:
            raise _refused(name, f"with it the archive unpacks to more than {bound >> 20} MiB")
        return "/".join(parts)

    def add_folder(self, name: str) -> None:
        if name in self.files:
            raise _refused(name, "stands in it twice")
        self.folders.add(name)

    def add_file(self, name: str, file: IO[bytes] | None, size: int) -> None:
        """A file, read to its end: what it declares and what it holds must be one."""
        if not name or name in self.files or name in self.folders:
            raise _refused(name, "stands in it twice")
        self.files.add(name)
        is_image = _is_visible(name) and name.lower().endswith(SUFFIXES)
        if is_image and size > MAX_MEMBER_BYTES:
            raise _refused(name, f"is an image file of more than {MAX_MEMBER_BYTES >> 20} MiB")
        head, real = b"", 0
        while file is not None and (chunk := file.read(1 << 20)):
            if not head:
                head = chunk[:HEAD_BYTES]
            real += len(chunk)
            if real > size:
                break
        if real != size:
            raise _refused(name, f"declares {size} bytes and holds {'more' if real > size else real}")
        if is_image:
            self._add_image(name, head)

    def _add_image(self, name: str, head: bytes) -> None:
        found = image_size(head)
        if found is None:
            raise _refused(name, "is no PNG, JPEG, WebP, BMP or GIF, or its header is damaged")
        width, height = found
        if not 0 < width * height <= MAX_PIXELS:
            raise _refused(name, f"has {width}x{height} pixels: 1 to {MAX_PIXELS} are possible")
        self.images.add(name)
        self.largest = max(self.largest, found, key=lambda size: size[0] * size[1])


def look_into(file: IO[bytes], kind: Kind, packed_bytes: int) -> ArchiveFacts:
    """The facts about an archive.

    Args:
        file: opened at its beginning; a zip must be seekable.
        kind: what it is said to be.
        packed_bytes: its size.

    Raises:
        ArchiveRefused: it names the member that is at fault, and what is wrong with it.
    """
    contents = _Contents(packed_bytes)
    try:
        _read_zip(file, contents) if kind == "zip" else _read_tar(file, kind, contents)
    except ArchiveRefused:
        raise
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise _refused("", f"it cannot be read as {kind}: {shorten(reason)}") from None
    return _as_classes(contents)


def _read_tar(file: IO[bytes], kind: Kind, contents: _Contents) -> None:
    with tarfile.open(fileobj=file, mode="r:gz" if kind == "tar.gz" else "r:") as archive:
        while (member := archive.next()) is not None:
            # Without keeping what has passed: an archive may have millions of members.
            cast(Any, archive).members.clear()
            name = contents.enter(member.name, member.size)
            if member.isdir():
                contents.add_folder(name)
            elif not member.isreg() or member.issparse():
                raise _refused(name, "is a link, a device or a file with holes")
            else:
                contents.add_file(name, archive.extractfile(member), member.size)
        # A header that is cut or damaged reads like the end: only there two blocks of zeros are.
        if archive.fileobj is None or archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is damaged or ends too early")


def _read_zip(file: IO[bytes], contents: _Contents) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # All sizes that are declared come first: nothing is unpacked of an archive that declares too much.
        names = [contents.enter(member.filename, member.file_size) for member in members]
        for member, name in zip(members, names, strict=True):
            mode = member.external_attr >> 16
            if member.is_dir():
                contents.add_folder(name)
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise _refused(name, "is a link or a device")
            elif member.flag_bits & 0x1:
                raise _refused(name, "has a password")
            else:
                with archive.open(member) as opened:
                    contents.add_file(name, opened, member.file_size)


def _as_classes(contents: _Contents) -> ArchiveFacts:
    """The archive as classes of images, by the rules of `ncfm_core.datasets.imagefolder`."""
    if not contents.images:
        raise _refused("", f"no images in {len(contents.files)} files")
    folders = {name for name in contents.folders if name and _is_visible(name)}
    for name in contents.files:
        if _is_visible(name):
            folders |= {str(parent) for parent in PurePosixPath(name).parents if parent.name}
    around = ""
    while (only := _only_folder(folders, around)) is not None:
        around += f"{only}/"
    tops = _below(folders, around)
    named = next((name for name in TEST_NAMES if name in tops), None)
    if named is not None and TRAIN not in tops:
        raise _refused("", f"there is a folder {named} but none named {TRAIN}")
    if named is not None:
        train, test = (_count(contents.images, folders, f"{around}{part}/") for part in (TRAIN, named))
        _check_same(train, test, named)
        classes = {name: (count, test[name]) for name, count in train.items()}
    else:
        whole = _count(contents.images, folders, around + (f"{TRAIN}/" if TRAIN in tops else ""))
        shares = {name: max(1, count // TEST_SHARE) if count else 0 for name, count in whole.items()}
        classes = {name: (count - shares[name], shares[name]) for name, count in whole.items()}
    _check(classes)
    used = sum(sum(counts) for counts in classes.values())
    return ArchiveFacts(
        classes=classes,
        split=f"{TRAIN} and {named}" if named else "ours",
        ignored_files=len(contents.files) - used,
        unpacked_bytes=contents.total,
        largest_image=contents.largest,
    )


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _below(folders: set[str], prefix: str) -> set[str]:
    return {name[len(prefix) :].split("/")[0] for name in folders if name.startswith(prefix)}


def _only_folder(folders: set[str], around: str) -> str | None:
    """The folder that holds all others, if it holds folders and is not one of the parts."""
    tops = _below(folders, around)
    only = next(iter(tops)) if len(tops) == 1 else None
    return only if only not in (None, TRAIN, *TEST_NAMES) and _below(folders, f"{around}{only}/") else None


def _count(images: set[str], folders: set[str], prefix: str) -> dict[str, int]:
    """Images of each class below a folder."""
    found = dict.fromkeys(sorted(_below(folders, prefix)), 0)
    for name in images:
        parts = name[len(prefix) :].split("/", 1)
        if name.startswith(prefix) and len(parts) == 2:
            found[parts[0]] += 1
    return found


def _check_same(train: dict[str, int], test: dict[str, int], part: str) -> None:
    if extra := sorted(test.keys() - train.keys()):
        raise _refused("", f"class {shorten(extra[0])} is in {part} but not in {TRAIN}")
    if missing := sorted(train.keys() - test.keys()):
        raise _refused("", f"class {shorten(missing[0])} has no images in {part}")


def _check(classes: dict[str, tuple[int, int]]) -> None:
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise _refused("", f"{len(classes)} classes: give one folder for each, 2 to {MAX_CLASSES}")
    for name, counts in classes.items():
        if not name.isprintable() or len(name) > MAX_NAME_CHARS:
            raise _refused("", f"class {ascii(name)[:MAX_NAME_CHARS]} has a name that cannot be published")
        if not all(counts):
            raise _refused(
                "", f"class {shorten(name)} has too few images: one for training and one for testing at least"
            )


def _refused(member: str, message: str) -> ArchiveRefused:
    hint = "One folder for each class, with plain image files, in a .tar, .tar.gz or .zip (docs/datasets.md)."
    return ArchiveRefused.of("body", member or None, f"refused: {message}" if not member else message, hint)


def _iter_limits() -> Iterator[tuple[int, int]]:
    yield resource.RLIMIT_AS, MEMORY_BYTES
    yield resource.RLIMIT_CPU, CPU_SECONDS
    yield resource.RLIMIT_CORE, 0


def main(kind: str) -> None:
    """Look into the archive on standard input, and print what was found."""
    for limit, value in _iter_limits():
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    assert kind in ("tar", "tar.gz", "zip")
    file = sys.stdin.buffer
    size = file.seek(0, 2)
    file.seek(0)
    try:
        answer: dict[str, object] = {"facts": asdict(look_into(file, cast(Kind, kind), size))}
    except ArchiveRefused as error:
        answer = {"problems": [problem.as_dict() for problem in error.problems]}
    except MemoryError:
        answer = {"problems": [_refused("", "to look into it takes too much memory").problems[0].as_dict()]}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
