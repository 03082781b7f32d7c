"""What stands around a spec in the body of a request: priority and labels. The spec itself, and so the worker, never has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from ncfm_core.catalog import nearest
from ncfm_core.errors import Problem, SpecError, shorten
from ncfm_core.spec import JobSpec

MAX_PRIORITY = 100
MAX_LABELS = 32
MAX_LABEL_CHARS = 255
LABEL_KEY = r"[a-z0-9._-]{1,63}"
_KEY = re.compile(LABEL_KEY)

Labels = dict[str, str]

ENVELOPE_SCHEMA: dict[str, Any] = {
    "priority": {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_PRIORITY,
        "default": 50,
        "description": "Higher ones go first, as if they had been posted earlier, by a minute a point. Not part of the spec.",
    },
    "labels": {
        "type": "object",
        "maxProperties": MAX_LABELS,
        "propertyNames": {"pattern": f"^{LABEL_KEY}$"},
        "additionalProperties": {"type": "string", "maxLength": MAX_LABEL_CHARS},
        "default": {},
        "description": "For finding jobs again. Not part of the spec.",
    },
}
"""JSON Schema of the envelope's keys."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a request sets beside the spec; None where it does not."""

    priority: int | None = None
    labels: Mapping[str, str | None] | None = None
    """A value of None takes a label away, where that is allowed."""


def split(document: Mapping[str, JsonValue]) -> tuple[Envelope, dict[str, JsonValue]]:
    """The envelope of a submission, and the submission proper.

    Raises:
        SpecError: the envelope is not legal.
    """
    rest = {key: value for key, value in document.items() if key not in ENVELOPE_SCHEMA}
    # The spec would not know what it is near to.
    known = (*JobSpec.model_fields, *ENVELOPE_SCHEMA)
    hints = {key: nearest(key.lower(), known) for key in rest if key not in known}
    near = {key: hint for key, hint in hints.items() if hint.endswith(tuple(f"{name!r}?" for name in ENVELOPE_SCHEMA))}
    if near:
        raise SpecError(*(Problem(key, shorten(rest[key]), "unknown key", hint) for key, hint in near.items()))
    return read_envelope(document), rest


def read_envelope(document: Mapping[str, JsonValue], *, may_remove: bool = False) -> Envelope:
    """The envelope's keys of a document, checked.

    Args:
        document: whose other keys are left alone.
        may_remove: whether a label may be null, which takes it away.

    Raises:
        SpecError: one of them is not legal.
    """
    problems: list[Problem] = []
    priority, labels = document.get("priority"), document.get("labels")
    if "priority" in document and not _is_priority(priority):
        hint = f"Choose a whole number from 0 to {MAX_PRIORITY}."
        problems.append(Problem("priority", shorten(priority), "not a priority", hint))
    if "labels" in document:
        problems.extend(_label_problems(labels, may_remove=may_remove))
    if problems:
        raise SpecError(*problems)
    return Envelope(
        int(priority) if isinstance(priority, int | float) else None,
        {key: value if value is None else str(value) for key, value in labels.items()}
        if isinstance(labels, dict)
        else None,
    )


def merged(labels: Mapping[str, str], changes: Mapping[str, str | None]) -> Labels:
    """Labels with changes laid over them.

    Raises:
        SpecError: there are too many of them then.
    """
    result = {key: value for key, value in (dict(labels) | dict(changes)).items() if value is not None}
    if len(result) > MAX_LABELS:
        raise SpecError(_too_many(len(result)))
    return result


def _is_priority(value: JsonValue) -> bool:
    """A whole number in range: JSON Schema takes 1.0 for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= MAX_PRIORITY and value == int(value)


def _too_many(count: int) -> Problem:
    return Problem("labels", str(count), "too many labels", f"Keep at most {MAX_LABELS}.")


def _label_problems(labels: JsonValue, *, may_remove: bool) -> Iterator[Problem]:
    if not isinstance(labels, dict):
        yield Problem("labels", shorten(labels), "not an object of texts", 'Try {"paper": "dm-2023"}.')
        return
    if len(labels) > MAX_LABELS:
        yield _too_many(len(labels))
    for key, value in labels.items():
        where = f"labels.{key}"
        if not _KEY.fullmatch(key):
            yield Problem(where, shorten(key), "not the name of a label", "Use 1 to 63 of a-z, 0-9, dot, _ and -.")
        elif not (isinstance(value, str) or (may_remove and value is None)):
            yield Problem(where, shorten(value), "not a text", "Write it in quotes.")
        elif isinstance(value, str) and (len(value) > MAX_LABEL_CHARS or "\0" in value):
            yield Problem(where, shorten(value), "too long, or with a NUL", f"Keep to {MAX_LABEL_CHARS} characters.")
