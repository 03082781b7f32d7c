"""What the API says to whoever sends it requests, in the words of the command line."""

from __future__ import annotations

import re
from dataclasses import replace

from ncfm_core.errors import Problem

_ID = r"([0-9a-z]{26})"
_COMMANDS = (
    (re.compile(rf"POST /jobs/{_ID}/cancel"), r"`ncfm cancel \1`"),
    (re.compile(rf"GET /jobs/{_ID}/artifacts"), r"`ncfm pull \1`"),
    (re.compile(rf"GET /jobs/{_ID}(?!/)"), r"`ncfm show \1`"),
    (re.compile(r"GET /jobs(?!/)"), "`ncfm ls`"),
    (re.compile(r"GET /datasets(?!/)"), "`ncfm datasets list`"),
    (re.compile(r"POST /datasets(?!/)"), "`ncfm datasets upload FILE`"),
    (re.compile(r"label=key:value"), "--label key=value"),
)


def in_commands(text: str) -> str:
    """A text with the command in place of each request that it names."""
    for request, command in _COMMANDS:
        text = request.sub(command, text)
    return text


def for_terminal(problem: Problem) -> Problem:
    """A problem whose way out is a command."""
    return replace(problem, message=in_commands(problem.message), hint=in_commands(problem.hint))
