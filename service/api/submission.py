"""The body of a submission, read by ourselves: whatever is wrong with it is said precisely, and nothing of it is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import JsonValue

from ncfm_core.errors import Problem, SpecError, shorten
from service.api.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType

MAX_BODY_BYTES = 256 * 1024
"""A spec needs a few KiB."""


class _NotFinite(float):
    """A number that JSON lets through but no field can hold, with the text it was written as."""

    def __new__(cls, text: str) -> _NotFinite:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


async def read_submission(request: Request) -> dict[str, JsonValue]:
    """The body as a JSON object.

    Raises:
        UnsupportedMediaType: it is not declared as JSON. A form of another site cannot declare that.
        BodyTooLarge: it is over the limit, by its declared or by its real length.
        MalformedBody: it is empty, not UTF-8, not JSON, nested too deeply, or has a key twice.
        SpecError: it is not an object, or a number in it is not finite.
    """
    _check_headers(request)
    return _object_in(await _read(request))


async def read_optional(request: Request) -> dict[str, JsonValue]:
    """The body as a JSON object, or an empty one where there is no body; raises as `read_submission` does."""
    body = await _read(request)
    if not body.strip():
        return {}
    _check_headers(request)
    return _object_in(body)


def _object_in(body: bytes) -> dict[str, JsonValue]:
    document = _parse(body)
    if not isinstance(document, dict):
        raise SpecError.of("", document, "a submission is an object", 'Try {"dataset": "digits", "ipc": 1}.')
    problems = list(_unusable(document))
    if problems:
        raise SpecError(*problems)
    return document


SubmissionDep = Annotated[dict[str, JsonValue], Depends(read_submission)]


def _check_headers(request: Request) -> None:
    given = request.headers.get("content-type", "")
    media_type, _, parameters = given.partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        hint = "Send application/json in UTF-8."
        raise UnsupportedMediaType.of("Content-Type", given, "a submission is JSON", hint)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType.of("Content-Encoding", encoding, "is not supported", "Send the body as it is.")


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large(f"{declared} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large(f"over {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _too_large(size: str) -> BodyTooLarge:
    message = f"larger than {MAX_BODY_BYTES} bytes"
    return BodyTooLarge(Problem("body", size, message, "A submission names its data, it does not hold them."))


def _parse(body: bytes) -> Any:
    if not body.strip():
        raise MalformedBody.of("body", None, "empty", 'Try {"dataset": "digits", "ipc": 1}.')
    try:
        return json.loads(
            body.decode("utf-8-sig"),
            parse_constant=_NotFinite,
            parse_float=_float,
            parse_int=_int,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        bad = body[error.start : error.start + 8]
        raise MalformedBody.of("body", bad, f"not UTF-8 at byte {error.start}", "Send UTF-8.") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        near = error.doc[max(0, error.pos - 10) : error.pos + 10]
        raise MalformedBody.of("body", near, f"not JSON at {at}: {error.msg}", "Mend it there.") from None
    except RecursionError:
        raise MalformedBody.of("body", None, "nested too deeply", "A spec needs five levels.") from None


def _float(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _NotFinite(text)


def _int(text: str) -> int | float:
    """An integer; one that not even a float can hold is as good as infinite (and slow to convert)."""
    return int(text) if len(text) <= 300 else _NotFinite(f"{text[:20]}e{len(text) - 20}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise MalformedBody.of("body", twice, "a key stands twice in one object", "Keep one of them.")
    return document


def _unusable(document: dict[str, Any]) -> Iterator[Problem]:
    """What JSON allows and we cannot keep: numbers that are not finite, halves of surrogate pairs. Without recursion."""
    stack: list[tuple[str, Any]] = [("", document)]
    while stack:
        path, value = stack.pop()
        children: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            children = [(f"{path}.{key}" if path else key, child) for key, child in value.items()]
            bad_text = next((key for key in value if _is_broken(key)), None)
        elif isinstance(value, list):
            children = [(f"{path}.{i}" if path else str(i), child) for i, child in enumerate(value)]
            bad_text = None
        else:
            bad_text = value if isinstance(value, str) and _is_broken(value) else None
        if isinstance(value, _NotFinite):
            yield Problem(path, value.text, "not a finite number", "Give a number within the field's bounds.")
        if bad_text is not None:
            yield Problem(path, shorten(bad_text), "not text: half of a surrogate pair", "Send it as UTF-8.")
            continue
        stack.extend(reversed(children))


def _is_broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
