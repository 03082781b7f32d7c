"""Server-sent events as a reader sees them (WHATWG HTML, 9.2), as far as this service's streams use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MEDIA_TYPE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a stream."""

    event: str
    """`message` where the stream names none."""
    data: str
    id: str
    """Empty where it has none."""


def parse(chunks: Iterable[bytes]) -> Iterator[Message]:
    """The messages in the bytes of a stream; comments are passed over, and a message that is cut off is none."""
    fields: dict[str, list[str]] = {}
    for line in _lines(chunks):
        if line:
            name, _, value = line.partition(":")
            if name:
                fields.setdefault(name, []).append(value.removeprefix(" "))
        elif fields and "data" not in fields:
            # Not a message (it may set the id to go on from, as a stream of a log does before its first line).
            fields = {}
        elif fields:
            event, number = fields.get("event", ["message"])[-1], fields.get("id", [""])[-1]
            yield Message(event, "\n".join(fields.get("data", ())), number)
            fields = {}


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines that end in a line feed: nothing else ends one here, whatever a log has in it."""
    held = b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", errors="replace")
