"""What is wrong with a parameter or a small body, in our words: with the bounds, the legal values or the form."""

from __future__ import annotations

import ast
from typing import Any

from ncfm_core.catalog import nearest
from ncfm_core.errors import Problem, shorten
from ncfm_core.submission import in_words
from service.api.envelope import LABEL_KEY, MAX_LABEL_CHARS

LABEL = rf"^{LABEL_KEY}:[^\x00]{{0,{MAX_LABEL_CHARS}}}$"
NO_NUL = r"^[^\x00]*$"
METRIC = r"^[^\x00]{1,128}$"
UPLOAD_CURSOR = r"^[0-9a-f]{64}$"
FORMS = {
    LABEL: "Write label=key:value; a key is 1 to 63 of a-z, 0-9, dot, _ and -.",
    NO_NUL: "Leave out the NUL.",
    METRIC: "Write the name of a metric: 1 to 128 characters, no NUL.",
    UPLOAD_CURSOR: "Pass `next` of the page before as it is, or nothing.",
}
"""The patterns of parameters in words."""
_PARSING = {
    "int_parsing": "Write a whole number, such as 1.",
    "int_parsing_size": "Write a whole number of a few digits.",
    "float_parsing": "Write a number, such as 0.5.",
    "bool_parsing": "Write true or false.",
}
"""The way out for a text of a query or header that is no value of its kind."""


def parameter_problem(details: Any) -> Problem:
    """A fault of a query, header or path, by an error of the framework."""
    # A number is the place among several values of one parameter: the caller knows the parameter alone.
    place, *names = details["loc"]
    field = ".".join(part for part in names if isinstance(part, str))
    if details["type"] == "missing":
        return Problem(field, "", "required", f"Add it to the {place}: {field}=..." if place == "query" else "Add it.")
    return _problem(field, details)


def body_problem(details: Any, known: tuple[str, ...]) -> Problem:
    """A fault of a body with few fields.

    Args:
        details: of the validation error.
        known: its legal keys.
    """
    field = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return Problem(field, shorten(details["input"]), "unknown key", nearest(field, known))
    return _problem(field, details)


def _problem(field: str, details: Any) -> Problem:
    kind, given = details["type"], details.get("input")
    value = "" if given is None else shorten(given)
    if kind in ("literal_error", "enum"):
        legal = tuple(ast.literal_eval(f"[{details['ctx']['expected'].replace(' or ', ', ')}]"))
        return Problem(field, value, "not one of the values it may have", nearest(str(given), legal))
    message, hint = in_words(details, FORMS)
    return Problem(field, value, message.removeprefix("input ").removeprefix("string "), _PARSING.get(kind, hint))
