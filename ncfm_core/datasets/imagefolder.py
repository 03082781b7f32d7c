"""The user's own images: one folder for each class, in a folder, a tar or a zip."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ncfm_core.datasets.decoding import SUFFIXES
from ncfm_core.datasets.listing import Entry, Listing
from ncfm_core.datasets.sources import Source, open_source
from ncfm_core.errors import DatasetError, shorten

TRAIN, TEST_NAMES = "train", ("test", "val")
"""Folders of the parts; of `test` and `val`, the first that is there is the test set."""
TEST_SHARE = 5
"""Where nobody split the data, one image in this many is for testing."""
MAX_CLASSES = 10_000
MAX_NAME_CHARS = 100

Classes = dict[str, list[str]]
"""Name of the class to the paths of its images, both sorted."""


def list_imagefolder(uri: str, data_dir: Path) -> Listing:
    """The classes, and which image is for training and which for testing; nothing is decoded yet.

    Args:
        uri: folder or archive, as a path or a file:// URI; a relative one is below `data_dir`.
        data_dir: folder of data sets.

    Raises:
        DatasetError: there is nothing there, or it cannot be taken as classes of images.
    """
    source = open_source(data_dir / _path(uri))
    tree = _Tree(source)
    named = next((name for name in TEST_NAMES if name in tree.parts), None)
    if named is not None and TRAIN in tree.parts:
        train, test = tree.classes(TRAIN), tree.classes(named)
        split = f"by the folders {TRAIN} and {named}"
        _check(source, train, TRAIN)
        _check_same(source, train, test, named)
    elif named is not None:
        hint = (
            f"Name the training images' folder {TRAIN}, or take the classes out of {named} and leave the split to us."
        )
        raise _wrong(source.where, f"there is a folder {named} but none named {TRAIN}", hint)
    else:
        whole = tree.classes(TRAIN if TRAIN in tree.parts else "")
        _check(source, whole, "")
        train, test = _split(source, whole)
        split = f"one image in {TEST_SHARE} of each class for testing: the first by sha256 of <class>/<file>"
    used = sum(len(paths) for part in (train, test) for paths in part.values())
    return Listing(
        source=source,
        class_names=tuple(train),
        train=tree.entries(train),
        test=tree.entries(test),
        split=split,
        ignored_files=len(source.sizes) - used,
    )


def _path(uri: str) -> Path:
    if not uri.startswith("file:"):
        return Path(uri).expanduser()
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        hint = "Write three slashes before an absolute path: file:///data/birds.tar."
        raise DatasetError.of("dataset.uri", uri, f"names the host {parts.netloc}", hint)
    return Path(unquote(parts.path))


class _Tree:
    """Images of a source by folder; hidden files and a folder around everything are looked through."""

    def __init__(self, source: Source) -> None:
        self._images = sorted(name for name in source.sizes if _is_visible(name) and name.lower().endswith(SUFFIXES))
        self._folders = {name for name in source.folders if name and _is_visible(name)}
        for name in source.sizes:
            if _is_visible(name):
                self._folders |= {str(parent) for parent in PurePosixPath(name).parents if parent.name}
        if not self._images:
            hint = f"One folder for each class, with files that end in {', '.join(SUFFIXES)}."
            raise _wrong(source.where, f"no images in {len(source.sizes)} files", hint)
        self._around = ""
        while (only := self._only_folder()) is not None:
            self._around += f"{only}/"
        self.parts = self._below("") & {TRAIN, *TEST_NAMES}

    def _only_folder(self) -> str | None:
        """The folder at the root that holds all others, if it holds folders and is not one of the parts."""
        tops = self._below("")
        only = next(iter(tops)) if len(tops) == 1 else None
        return only if only not in (None, TRAIN, *TEST_NAMES) and self._below(f"{only}/") else None

    def _below(self, prefix: str) -> set[str]:
        prefix = self._around + prefix
        return {
            name[len(prefix) :].split("/")[0] for name in self._folders if name.startswith(prefix) and name != prefix
        }

    def classes(self, part: str) -> Classes:
        """The classes of a part (or, without one, of the root); images in folders below a class are of that class."""
        prefix = f"{part}/" if part else ""
        found: Classes = {name: [] for name in sorted(self._below(prefix))}
        prefix = self._around + prefix
        for name in self._images:
            inner = name[len(prefix) :].split("/", 1)
            if name.startswith(prefix) and len(inner) == 2:
                found[inner[0]].append(f"{part}/{inner[0]}/{inner[1]}" if part else "/".join(inner))
        return found

    def entries(self, classes: Classes) -> list[Entry]:
        return [(self._around + path, label) for label, paths in enumerate(classes.values()) for path in paths]


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _check(source: Source, classes: Classes, part: str) -> None:
    """Names and sizes of the classes of the training images, or of all where part is empty."""
    where = f" below {part}" if part else ""
    if len(classes) < 2:
        found = f"only one class{where}: {shorten(next(iter(classes)))}" if classes else f"no class folders{where}"
        raise _wrong(source.where, found, "Give one folder for each class, two or more.")
    if len(classes) > MAX_CLASSES:
        raise _wrong(source.where, f"{len(classes)} classes{where}", f"At most {MAX_CLASSES} are possible.")
    for name, paths in classes.items():
        if not name.isprintable() or len(name) > MAX_NAME_CHARS:
            hint = f"Name it in printable UTF-8, in at most {MAX_NAME_CHARS} characters."
            raise _wrong(
                source.where, f"class {ascii(name)[:MAX_NAME_CHARS]} has a name that cannot be published", hint
            )
        if not paths:
            raise _empty(source, name, where)


def _check_same(source: Source, train: Classes, test: Classes, part: str) -> None:
    """Both parts have the same classes, with images of each."""
    if extra := sorted(test.keys() - train.keys()):
        hint = f"Remove it or add it to {TRAIN}."
        raise _wrong(source.where, f"class {shorten(extra[0])} is in {part} but not in {TRAIN}", hint)
    for name in train:
        if not test.get(name):
            raise _empty(source, name, f" below {part}")


def _split(source: Source, whole: Classes) -> tuple[Classes, Classes]:
    """A fixed split that depends on the names of class and files alone, so a folder and its archive give the same."""
    train: Classes = {}
    test: Classes = {}
    for name, paths in whole.items():
        if len(paths) < 2:
            hint = "Give two or more: one is for testing."
            raise _wrong(source.where, f"class {shorten(name)} has a single image", hint)
        inner = [path.removeprefix(f"{TRAIN}/") if path.startswith(f"{TRAIN}/{name}/") else path for path in paths]
        order = sorted(zip(inner, paths, strict=True), key=lambda each: hashlib.sha256(os.fsencode(each[0])).digest())
        share = max(1, len(paths) // TEST_SHARE)
        test[name] = sorted(path for _, path in order[:share])
        train[name] = sorted(path for _, path in order[share:])
    return train, test


def _empty(source: Source, name: str, where: str) -> DatasetError:
    return _wrong(source.where, f"class {shorten(name)}{where} has no images", "Add some, or remove its folder.")


def _wrong(where: str, message: str, hint: str) -> DatasetError:
    return DatasetError.of("dataset.uri", where, message, hint)
