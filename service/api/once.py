"""The Idempotency-Key header: a request that is sent again is carried out once."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated

from fastapi import Header
from pydantic import JsonValue

from service.api.errors import InvalidParameter
from service.store import IdempotencyKey

MAX_KEY_CHARS = 255
_KEY = re.compile(rf"[\x20-\x7e]{{1,{MAX_KEY_CHARS}}}")

IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        # For the document alone: what is wrong with a key is said in our words.
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": r"^[\x20-\x7e]+$"},
        description="Up to 255 printable ASCII characters, new for each new request: the same request under the same key is "
        "carried out once, and answered with the job that it made.",
    ),
]
REPLAYED = "Idempotency-Replayed"


def idempotency_key(given: str | None, *, owner: str, operation: str, document: JsonValue) -> IdempotencyKey | None:
    """The key of a request; None where it has none.

    Args:
        given: value of the header.
        owner: who sent it: a key is this one's own.
        operation: method and path.
        document: the body.

    Raises:
        InvalidParameter: it is not legal.
    """
    if given is None:
        return None
    if not _KEY.fullmatch(given):
        hint = f"Use 1 to {MAX_KEY_CHARS} printable ASCII characters, such as a UUID."
        raise InvalidParameter.of("Idempotency-Key", given, "not a key", hint)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return IdempotencyKey(owner, operation, given, hashlib.sha256(canonical.encode()).hexdigest())
