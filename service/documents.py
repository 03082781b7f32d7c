"""Submissions as people write them: YAML or JSON files, and `key=value` on a command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from ncfm_core.errors import NcfmError

MAX_BYTES = 1 << 20


class DocumentError(NcfmError):
    """A submission cannot be read."""

    code = "document_error"


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


def read_document(path: Path) -> dict[str, JsonValue]:
    """The submission in a file, or on standard input for `-`.

    Raises:
        DocumentError: it cannot be read, or is not an object of plain values.
    """
    name = str(path)
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" else _read(path)
    except OSError as error:
        raise DocumentError.of(
            "spec", name, f"cannot be read: {error.strerror}", "Name a YAML or JSON file."
        ) from error
    if len(data) > MAX_BYTES:
        raise DocumentError.of("spec", name, "larger than 1 MiB", "A spec has a few dozen lines.")
    try:
        return check_document(parse_yaml(data.decode("utf-8"), name))
    except UnicodeDecodeError:
        raise DocumentError.of("spec", name, "not text in UTF-8", "Name a YAML or JSON file.") from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def parse_yaml(text: str, name: str) -> Any:
    """The value that a text stands for.

    Raises:
        DocumentError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DocumentError.of("spec", name, f"not YAML: {error.problem}{where}", "Mend that line.") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise DocumentError.of("spec", name, f"not YAML: {reason}", "") from None
    except RecursionError:
        raise DocumentError.of("spec", name, "nested too deeply", "A spec needs five levels.") from None


def check_document(document: Any) -> dict[str, JsonValue]:
    """The document itself, if it can be sent as JSON.

    Raises:
        DocumentError: it is not an object, or holds what JSON cannot.
    """
    if not isinstance(document, Mapping):
        raise DocumentError.of("spec", document, "a submission is an object", "Begin with `dataset: digits`.")
    try:
        plain: dict[str, JsonValue] = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DocumentError.of("spec", None, f"cannot be sent as JSON: {reason}", "Use finite, plain values.") from None
    return plain


def with_settings(document: Mapping[str, JsonValue], settings: Sequence[str]) -> dict[str, JsonValue]:
    """The document with `dotted.path=value` laid over it; values are YAML.

    Raises:
        DocumentError: a setting is not of that form, or leads through a plain value.
    """
    changed = check_document(document)
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, last = path.strip().split(".")
        if not equals or not last or not all(parents):
            raise DocumentError.of("--set", setting, "not of the form key=value", "Try --set method.steps=500.")
        at: Any = changed
        for parent in parents:
            # A part given by its name alone, such as `method: ncfm`, is the short form of an object.
            if isinstance(at.get(parent), str):
                at[parent] = {"name": at[parent]}
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise DocumentError.of("--set", setting, f"{parent} is not an object", "Name a field inside one.")
        at[last] = parse_yaml(text, setting)
    return check_document(changed)
