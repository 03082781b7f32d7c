"""Reading a submission from a file or from the storage root, with changes made on the command line. Light."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from pydantic import JsonValue

from ncfm_core.errors import SpecError, shorten
from ncfm_core.presets import resolve
from ncfm_core.spec import JobSpec
from worker.storage import Storage

STORED = "storage:"
MAX_BYTES = 1 << 20


def load_spec(source: str, changes: Sequence[str], open_storage: Callable[[], Storage]) -> JobSpec:
    """The resolved spec.

    Args:
        source: path of a YAML or JSON file, or `storage:` and a path below the storage root.
        changes: `dotted.name=value`, the value as YAML.
        open_storage: for a stored one.

    Raises:
        SpecError: it is missing, broken or not legal.
    """
    data = _stored(source.removeprefix(STORED), open_storage()) if source.startswith(STORED) else _file(Path(source))
    if len(data) > MAX_BYTES:
        raise SpecError.of("", source, f"larger than {MAX_BYTES} bytes", "A spec has a few lines.")
    try:
        # One loader for both: JSON is YAML.
        document: JsonValue = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError.of("", source, f"neither YAML nor JSON: {_first_line(error)}", "") from None
    if not isinstance(document, dict):
        raise SpecError.of("", source, "holds no spec", "The smallest one is: {dataset: digits, ipc: 1}")
    for change in changes:
        _apply(document, change)
    return resolve(document)


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError.of(
            "", str(path), f"cannot be read: {error.strerror or error}", "Name a YAML or JSON file."
        ) from None


def _stored(path: str, storage: Storage) -> bytes:
    data = storage.get(path)
    if data is None:
        raise SpecError.of("", path, f"there is no such object below {storage.url}", "Is NCFM_STORAGE the same?")
    return data


def _first_line(error: Exception) -> str:
    """The parser's words with the place, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0] if str(error) else "too deeply nested"
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(problem)


def _apply(document: dict[str, JsonValue], change: str) -> None:
    """Lay one `dotted.name=value` over the submission."""
    name, found, text = change.partition("=")
    if not found or not name:
        raise SpecError.of("--set", change, "must be name=value", "Try --set method.steps=100.")
    try:
        value: JsonValue = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError.of(name, text, f"not a value: {_first_line(error)}", "") from None
    *parents, last = name.split(".")
    place: JsonValue = document
    for parent in parents:
        place = _enter(place, parent, change)
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise SpecError.of("--set", change, f"{last} cannot be set there", "")


def _enter(place: JsonValue, name: str, change: str) -> JsonValue:
    """The part of that name, made where it is missing; a part given by its name alone becomes an object."""
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return place[int(name)]
    if not isinstance(place, dict):
        raise SpecError.of("--set", shorten(change), f"{name} is not inside an object", "")
    inner = place.get(name)
    if isinstance(inner, str):
        inner = {"name": inner}
    if inner is None:
        inner = {}
    place[name] = inner
    return inner
