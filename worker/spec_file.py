"""Submissions as people write them: YAML or JSON files, a stored spec, and `key=value` on a command line. Light."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from ncfm_core.errors import Problem, SpecError, shorten
from ncfm_core.spec import JobSpec
from ncfm_core.submission import HINTS, resolve
from worker.storage import Storage

Document = dict[str, JsonValue]

STORED = "storage:"
MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML as JSON would have it: 1e-3 is a number, and a date or `on` is text."""


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), list("tf"))


def load_spec(source: str, changes: Sequence[str], open_storage: Callable[[], Storage]) -> JobSpec:
    """The resolved spec.

    Args:
        source: path of a YAML or JSON file, or `storage:` and a path below the storage root.
        changes: `dotted.name=value`, the value as YAML.
        open_storage: for a stored one.

    Raises:
        SpecError: it is missing, broken or not legal.
    """
    if source.startswith(STORED):
        document = parse_document(_stored(source.removeprefix(STORED), open_storage()), source)
    else:
        document = read_document(Path(source))
    return resolve(with_changes(document, changes))


def read_document(path: Path) -> Document:
    """The submission in a file, or on standard input for `-`.

    Raises:
        SpecError: it cannot be read, or is not an object of plain values.
    """
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if str(path) == "-" else _read(path)
    except OSError as error:
        raise _wrong(str(path), f"cannot be read: {error.strerror}", "Name a YAML or JSON file.") from None
    return parse_document(data, str(path))


def parse_document(data: bytes, name: str) -> Document:
    """The submission that some bytes hold; JSON is YAML.

    Raises:
        SpecError: it is not an object of plain values.
    """
    if len(data) > MAX_BYTES:
        raise _wrong(name, "larger than 1 MiB", "A spec has a few dozen lines.")
    try:
        return _plain(_parse(data.decode("utf-8"), name))
    except UnicodeDecodeError:
        raise _wrong(name, "not text in UTF-8", "Name a YAML or JSON file.") from None


def with_changes(document: Mapping[str, JsonValue], changes: Sequence[str]) -> Document:
    """The document with each `dotted.path=value` laid over it; values are YAML, list entries are named by their number.

    Raises:
        SpecError: a change is not of that form, or leads through a plain value.
    """
    changed = _plain(document)
    for change in changes:
        path, equals, text = change.partition("=")
        *parents, last = path.strip().split(".")
        if not equals or not last or not all(parents):
            raise _wrong(change, "not of the form key=value", "Try --set method.steps=500.", field="--set")
        place: Any = changed
        for parent in parents:
            place = _enter(place, parent, change)
        if isinstance(place, dict):
            place[last] = _parse(text, change)
        elif isinstance(place, list) and last.isdecimal() and int(last) < len(place):
            place[int(last)] = _parse(text, change)
        else:
            raise _wrong(change, f"{last} cannot be set there", "Name a field inside an object.", field="--set")
    return _plain(changed)


def _enter(place: Any, name: str, change: str) -> Any:
    """The part of that name, made where it is missing; a part given by its name alone becomes an object."""
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return place[int(name)]
    if not isinstance(place, dict):
        raise _wrong(change, f"{name} is not inside an object", "Name a field inside one.", field="--set")
    if isinstance(place.get(name), str):
        place[name] = {"name": place[name]}
    return place.setdefault(name, {})


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _stored(path: str, storage: Storage) -> bytes:
    data = storage.get(path)
    if data is None:
        raise _wrong(path, f"there is no such object below {storage.url}", "Is NCFM_STORAGE the same?")
    return data


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _wrong(name, f"not YAML: {error.problem}{where}", "Mend that line.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _wrong(name, f"not YAML: {(str(error).splitlines() or ['unreadable'])[0]}") from None
    except RecursionError:
        raise _wrong(name, "nested too deeply", "A spec needs five levels.") from None


def _plain(document: Any) -> Document:
    """A copy of the document, if it can be sent as JSON."""
    if not isinstance(document, Mapping):
        raise _wrong(document, "a submission is an object", "The smallest one is: {dataset: digits, ipc: 1}")
    try:
        plain: Document = json.loads(json.dumps(document))
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _wrong(None, f"cannot be sent as JSON: {reason}", "Use plain values.") from None
    if infinite := list(_infinite(plain)):
        # As the API says of them, which never gets them: JSON has no such numbers.
        message = "input should be a finite number"
        raise SpecError(*(Problem(path, shorten(value), message, HINTS["finite_number"]) for path, value in infinite))
    return plain


def _infinite(document: Document) -> Iterator[tuple[str, float]]:
    """Dotted path and value of every number that is none; without recursion."""
    places: list[tuple[str, JsonValue]] = [("", document)]
    while places:
        path, place = places.pop()
        if isinstance(place, float) and not math.isfinite(place):
            yield path, place
        inside = place.items() if isinstance(place, dict) else enumerate(place) if isinstance(place, list) else ()
        places += [(f"{path}.{name}".lstrip("."), value) for name, value in reversed(list(inside))]


def _wrong(value: object, message: str, hint: str = "", *, field: str = "spec") -> SpecError:
    return SpecError.of(field, value, message, hint)
