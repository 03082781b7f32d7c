"""What commands print: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from rich.console import Console

results = Console(highlight=False, soft_wrap=True)
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def as_json(document: Mapping[str, object]) -> None:
    """One line of JSON, for programs."""
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    sys.stdout.flush()
