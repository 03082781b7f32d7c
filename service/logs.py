"""The log of api and controller: one line for each thing that happens, as JSON or as text, with secrets masked."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from worker.redaction import redact

Format = Literal["auto", "json", "text"]

FIELDS = ("action", "job", "request_id", "method", "route", "status", "ms", "key", "address", "path")
"""What a line may carry beside its sentence, given as `extra=`."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served, for lines that do not name it."""


class JsonFormatter(logging.Formatter):
    """A line as one JSON object: time, level, logger, message, and what was given with it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        line |= _extras(record)
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A line for people; what was given with it stands behind the sentence where that does not say it."""

    def format(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items() if name == "request_id")
        # One line stays one line, whatever somebody put into a name.
        message = redact(record.getMessage()).replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname} {message}{extras}"
        return f"{line}\n{redact(self.formatException(record.exc_info))}" if record.exc_info else line


def configure(chosen: Format) -> None:
    """Set up the log of this process, on standard error.

    Args:
        chosen: `auto` is text on a terminal, else JSON.
    """
    as_text = chosen == "text" or (chosen == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # One line for each request to Ray would bury the moves.
    for name in ("httpx", "httpcore", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extras(record: logging.LogRecord) -> dict[str, object]:
    found = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
    if "request_id" not in found and request_id.get():
        found["request_id"] = request_id.get()
    return {name: redact(value) if isinstance(value, str) else value for name, value in found.items()}
