"""Published sets that come as image files in one folder for each class: Tiny ImageNet, ImageNet-1K and its subsets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from ncfm_core.catalog import DatasetFacts
from ncfm_core.datasets.decoding import SUFFIXES
from ncfm_core.datasets.listing import Entry, Listing
from ncfm_core.datasets.sources import Folder
from ncfm_core.errors import DatasetError, shorten

TINY = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"
NAME_FILES = ("words.txt", "LOC_synset_mapping.txt")
"""Names of WordNet ids: `<wnid> <name>[, <name> ...]` in each line; optional."""


def list_tiny_imagenet(facts: DatasetFacts, data_dir: Path) -> Listing:
    """Tiny ImageNet as published, or with one folder for each class in `val` too.

    Raises:
        DatasetError: files are missing or do not fit together.
    """
    root = data_dir / TINY
    source = Folder(root, ("train", "val"))
    wnids = _subfolders(root / "train")
    if not wnids:
        raise missing(facts, data_dir)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    test = _annotated(source, root, labels) if (root / ANNOTATIONS).is_file() else _of_classes(source, "val", wnids)
    return _listing(facts, source, root, wnids, test)


def list_imagenet(facts: DatasetFacts, data_dir: Path) -> Listing | None:
    """ImageNet-1K or some of its classes, from a folder of its own or from that of ImageNet; None where there is neither.

    Raises:
        DatasetError: a class is missing.
    """
    root = next((data_dir / name for name in (facts.name, "imagenet") if (data_dir / name / "train").is_dir()), None)
    if root is None:
        return None
    wnids = facts.wnids or _subfolders(root / "train")
    source = Folder(root, [f"{part}/{wnid}" for part in ("train", "val") for wnid in wnids])
    return _listing(facts, source, root, wnids, _of_classes(source, "val", wnids))


def missing(facts: DatasetFacts, data_dir: Path) -> DatasetError:
    """None of the files of a set are there."""
    message = f"no data below {data_dir}: looked for {', '.join(facts.files)}"
    return DatasetError.of("dataset.name", facts.name, message, f"{facts.origin} NCFM_DATA_DIR names another folder.")


def _listing(facts: DatasetFacts, source: Folder, root: Path, wnids: tuple[str, ...], test: list[Entry]) -> Listing:
    train = _of_classes(source, "train", wnids)
    for part, entries in (("train", train), ("val", test)):
        found = {label for _, label in entries}
        if lacking := [wnid for label, wnid in enumerate(wnids) if label not in found]:
            message = f"no images of {len(lacking)} classes in {root / part}, such as {lacking[0]}"
            hint = f"One folder for each class is wanted there: {root / part / lacking[0]}. {facts.origin}"
            raise DatasetError.of("dataset.name", facts.name, message, hint)
    return Listing(
        source=source,
        class_names=facts.class_names or _names(root, wnids),
        train=train,
        test=test,
        ignored_files=len(source.sizes) - len(train) - len(test),
    )


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()


def _of_classes(source: Folder, part: str, wnids: Collection[str]) -> list[Entry]:
    """Images in `<part>/<wnid>/`, by class in the order of the labels, then by name."""
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    by_class: dict[int, list[str]] = defaultdict(list)
    for name in source.sizes:
        first, _, rest = name.partition("/")
        label = labels.get(rest.partition("/")[0])
        if first == part and label is not None and name.lower().endswith(SUFFIXES):
            by_class[label].append(name)
    return [(name, label) for label in sorted(by_class) for name in sorted(by_class[label])]


def _annotated(source: Folder, root: Path, labels: dict[str, int]) -> list[Entry]:
    """`val/images/*` by the lines of `val_annotations.txt`: file, WordNet id and a box, with tabs between."""
    entries = []
    for number, line in enumerate((root / ANNOTATIONS).read_text(errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        path, wnid = f"val/images/{name}", rest.partition("\t")[0]
        if not line.strip():
            continue
        if path not in source.sizes or wnid not in labels:
            message = f"line {number} names {shorten(name)} of class {shorten(wnid)}, which is not there"
            raise DatasetError.of("dataset.name", str(root / ANNOTATIONS), message, "Unpack the archive again.")
        entries.append((path, labels[wnid]))
    return sorted(entries, key=lambda entry: (entry[1], entry[0]))


def _names(root: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """`<wnid>-<name>`, or the WordNet id alone: names alone are not unique (there are two cranes)."""
    names: dict[str, str] = {}
    for file in NAME_FILES:
        if (root / file).is_file():
            for line in (root / file).read_text(errors="replace").splitlines():
                wnid, *words = line.replace("\t", " ").split(",")[0].split()
                names[wnid] = "-".join("".join(char if char.isalnum() else "-" for char in word) for word in words)
            break
    return tuple(f"{wnid}-{names[wnid].lower()}" if names.get(wnid) else wnid for wnid in wnids)
