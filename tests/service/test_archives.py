"""What is found in an uploaded archive, and that no hostile one gets past; the rules are held against those of ncfm_core."""

from __future__ import annotations

import gzip
import io
import json
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from ncfm_core.datasets.decoding import SUFFIXES as CORE_SUFFIXES
from ncfm_core.datasets.imagefolder import list_imagefolder
from ncfm_core.errors import DatasetError
from service import archives
from service.archives import ArchiveFacts, ArchiveRefused, Kind, look_into
from service.image_headers import SUFFIXES, image_size

Files = dict[str, bytes]


def picture(width: int = 9, height: int = 7, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(out, form, **options)
    return out.getvalue()


PNG = picture()
CLASSES = {f"{name}/{index}.png": PNG for name, count in (("cat", 6), ("dog", 11)) for index in range(count)}


def packed(kind: Kind, files: Files) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w:") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                if name.endswith("/"):
                    member.type = tarfile.DIRTYPE
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def looked(data: bytes, kind: Kind) -> ArchiveFacts:
    return look_into(io.BytesIO(data), kind, len(data))


TREES: list[Files] = [
    CLASSES,
    {f"birds/{name}": data for name, data in CLASSES.items()},
    {f"a/b/{name}": data for name, data in CLASSES.items()} | {"a/LICENSE": b"none", "a/b/cat/notes.txt": b"x"},
    {f"{part}/{name}": data for part in ("train", "test") for name, data in CLASSES.items()},
    {f"set/{part}/{name}": data for part in ("train", "val") for name, data in CLASSES.items()},
    {f"train/{name}": data for name, data in CLASSES.items()} | {"other/x/1.png": PNG},
    {**CLASSES, ".hidden/1.png": PNG, "__MACOSX/cat/1.png": PNG, "cat/deep/er/1.JPG": picture(form="JPEG")},
    {f"./{name}": data for name, data in CLASSES.items()},
    # Those that both refuse.
    {"cat/1.png": PNG, "dog/1.png": PNG},
    {"cat/1.png": PNG, "cat/2.png": PNG},
    {f"test/{name}": data for name, data in CLASSES.items()},
    {**{f"train/{name}": data for name, data in CLASSES.items()}, "test/cat/1.png": PNG},
    {**{f"{part}/{name}": PNG for part in ("train", "test") for name in CLASSES}, "test/eel/1.png": PNG},
    {"readme.txt": b"x"},
    {**CLASSES, "empty/": b""},
    {**CLASSES, "a\x07b/1.png": PNG, "a\x07b/2.png": PNG},
]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("number", range(len(TREES)))
def test_archive_is_read_as_the_core_reads_it(tmp_path: Path, kind: Kind, number: int) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(packed(kind, TREES[number]))
    try:
        listing = list_imagefolder(str(path), tmp_path)
    except DatasetError:
        with pytest.raises(ArchiveRefused):
            looked(path.read_bytes(), kind)
        return
    facts = looked(path.read_bytes(), kind)
    parts = [Counter(listing.class_names[label] for _, label in part) for part in (listing.train, listing.test)]
    assert facts.classes == {name: (parts[0][name], parts[1][name]) for name in listing.class_names}
    assert facts.ignored_files == listing.ignored_files
    assert facts.split == ("ours" if listing.split.startswith("one image") else listing.split[15:])
    assert SUFFIXES == CORE_SUFFIXES


def test_size_of_an_image_is_found_in_every_format() -> None:
    forms: list[tuple[str, dict[str, object]]] = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(60_000), "comment": b"x" * 60_000}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
    ]
    for form, options in forms:
        data = picture(321, 45, form, **options)
        assert image_size(data) == (321, 45), (form, options)
        for cut in range(24):
            assert image_size(data[:cut]) in (None, (321, 45)), (form, cut)
    for other in (
        b"",
        b"II*\0" + bytes(40),
        b"<svg/>",
        b"%PDF-1.7",
        b"\xff\xd8\xff\xe0\x00\x00",
        b"\xff\xd8" + b"\xff" * 99,
    ):
        assert image_size(other) is None


def tar_of(*members: tarfile.TarInfo, files: Files = CLASSES) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as tar:
        for name, data in files.items():
            plain = tarfile.TarInfo(name)
            plain.size = len(data)
            tar.addfile(plain, io.BytesIO(data))
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_of(name: str, data: bytes = PNG, *, mode: int = 0, **changes: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, content in CLASSES.items():
            archive.writestr(path, content)
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = changes.pop("compress_type", zipfile.ZIP_STORED)
        archive.writestr(info, data)
        for field, value in changes.items():
            setattr(archive.infolist()[-1], field, value)
    return out.getvalue()


def twice(kind: Kind) -> bytes:
    if kind == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
            for path, content in [*CLASSES.items(), ("cat/0.png", PNG)]:
                archive.writestr(path, content)
        return out.getvalue()
    return tar_of(special("cat/0.png", tarfile.REGTYPE))


def damaged_zip() -> bytes:
    """A member whose bytes are not those of its sum."""
    data = bytearray(zip_of("cat/x.png"))
    at = data.rindex(b"IDAT", 0, data.rindex(b"PK\x01\x02"))
    data[at + 6] ^= 0xFF
    return bytes(data)


def flate_bomb() -> bytes:
    return zip_of("cat/bomb.txt", bytes(2 << 20), compress_type=zipfile.ZIP_DEFLATED)


BAD_NAMES = [
    "../up.png",
    "cat/../../up.png",
    "/etc/cat.png",
    "C:/cat/1.png",
    "c:cat.png",
    "cat\\..\\up.png",
    "\\\\host\\share\\1.png",
    "..",
    "a/" * 600 + "1.png",
]
HOSTILE: list[tuple[str, Kind, Callable[[], bytes], str]] = [
    *((f"tar {name[:20]}", "tar", lambda name=name: packed("tar", {**CLASSES, name: PNG}), "") for name in BAD_NAMES),
    *((f"zip {name[:20]}", "zip", lambda name=name: zip_of(name), "") for name in BAD_NAMES if "\\" not in name),
    ("symbolic link", "tar", lambda: tar_of(special("cat/l.png", tarfile.SYMTYPE, "/etc/passwd")), "link"),
    ("hard link", "tar", lambda: tar_of(special("cat/l.png", tarfile.LNKTYPE, "cat/0.png")), "link"),
    ("device", "tar", lambda: tar_of(special("cat/null.png", tarfile.CHRTYPE)), "device"),
    ("fifo", "tar", lambda: tar_of(special("cat/fifo", tarfile.FIFOTYPE)), "device"),
    ("link in a zip", "zip", lambda: zip_of("cat/l.png", b"/etc/passwd", mode=stat.S_IFLNK | 0o777), "link"),
    ("device in a zip", "zip", lambda: zip_of("cat/d.png", mode=stat.S_IFCHR | 0o777), "device"),
    ("member twice", "tar", lambda: twice("tar"), "twice"),
    ("member twice in a zip", "zip", lambda: twice("zip"), "twice"),
    ("file that is a folder", "tar", lambda: packed("tar", {**CLASSES, "cat/0.png/": b""}), "twice"),
    ("cut tar", "tar", lambda: packed("tar", CLASSES)[:5000], ""),
    ("cut gzip", "tar.gz", lambda: packed("tar.gz", CLASSES)[:-300], ""),
    ("cut zip", "zip", lambda: packed("zip", CLASSES)[:-30], ""),
    ("damaged member", "zip", damaged_zip, ""),
    ("damaged gzip", "tar.gz", lambda: packed("tar.gz", CLASSES)[:100] + b"\0" * 50, ""),
    ("tar said to be a zip", "zip", lambda: packed("tar", CLASSES), "cannot be read as zip"),
    ("zip said to be a tar", "tar", lambda: packed("zip", CLASSES), "cannot be read as tar"),
    ("gzip said to be a tar", "tar", lambda: packed("tar.gz", CLASSES), "cannot be read as tar"),
    ("tar said to be a gzip", "tar.gz", lambda: packed("tar", CLASSES), "cannot be read as tar.gz"),
    ("nothing", "tar", lambda: b"", ""),
    ("an empty tar", "tar", lambda: packed("tar", {}), "no images"),
    ("an empty zip", "zip", lambda: packed("zip", {}), "no images"),
    ("zeros", "tar", lambda: bytes(10_240), ""),
    ("no image", "zip", lambda: zip_of("cat/x.png", b"GIF is not what this is"), "header is damaged"),
    ("pickle as an image", "zip", lambda: zip_of("cat/x.jpg", b"\x80\x04\x95"), "header is damaged"),
    (
        "huge image",
        "zip",
        lambda: zip_of("cat/x.png", PNG[:16] + struct.pack(">II", 60_000, 60_000) + PNG[24:]),
        "pixels",
    ),
    (
        "image without pixels",
        "zip",
        lambda: zip_of("cat/x.png", PNG[:16] + struct.pack(">II", 0, 9) + PNG[24:]),
        "pixels",
    ),
    ("password", "zip", lambda: zip_of("cat/x.png", flag_bits=1), "password"),
    ("declares less than it holds", "zip", lambda: zip_of("cat/x.png", file_size=5), ""),
    ("declares more than it holds", "zip", lambda: zip_of("cat/x.png", file_size=500), ""),
    ("declares exabytes", "zip", lambda: zip_of("cat/x.png", file_size=1 << 60), "unpacks to more"),
]


@pytest.mark.parametrize(("what", "kind", "make", "says"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_hostile_archive_is_refused(what: str, kind: Kind, make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(ArchiveRefused, match=says or None) as caught:
        looked(make(), kind)
    [problem] = caught.value.problems
    assert problem.field == "body" and problem.hint


def test_bomb_is_refused_by_its_ratio_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    data = flate_bomb()
    with pytest.raises(ArchiveRefused, match="unpacks to more than 1 MiB"):
        looked(data, "zip")
    tar_data = gzip.compress(tar_of(_zeros("cat/bomb.txt", 2 << 20)))
    with pytest.raises(ArchiveRefused, match="unpacks to more than 1 MiB"):
        looked(tar_data, "tar.gz")
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    with pytest.raises(ArchiveRefused, match="more than 10 members"):
        looked(packed("tar", CLASSES), "tar")


def _zeros(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def test_image_file_when_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", len(PNG) - 1)
    with pytest.raises(ArchiveRefused, match="image file of more than"):
        looked(packed("zip", CLASSES), "zip")


def in_a_process(data: bytes, kind: Kind, tmp_path: Path) -> tuple[int, dict[str, object]]:
    path = tmp_path / "archive"
    path.write_bytes(data)
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "service.archives", kind], stdin=file, capture_output=True, check=False, timeout=60
        )
    assert b"Traceback" not in done.stderr, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return done.returncode, answer


def pax_bomb() -> bytes:
    """A header that says it has more text than there is memory, with as many zeros behind it, packed small."""
    size = 3 << 30
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, size
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 24)
    parts: Iterable[bytes] = (packer.compress(zeros) for _ in range(8))
    return packer.compress(header.tobuf(tarfile.GNU_FORMAT)) + b"".join(parts) + packer.flush()


def test_process_answers_with_facts_or_with_what_is_wrong(tmp_path: Path) -> None:
    code, answer = in_a_process(packed("tar.gz", CLASSES), "tar.gz", tmp_path)
    facts = answer["facts"]
    assert code == 0 and isinstance(facts, dict)
    assert facts["classes"] == {"cat": [5, 1], "dog": [9, 2]}
    code, answer = in_a_process(packed("zip", {"a": b""}), "zip", tmp_path)
    assert code == 0 and "no images" in str(answer["problems"])


def test_process_when_a_header_asks_for_all_memory_refuses(tmp_path: Path) -> None:
    code, answer = in_a_process(pax_bomb(), "tar.gz", tmp_path)
    assert code == 0 and "refused" in str(answer["problems"])
