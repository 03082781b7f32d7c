"""What a caller of the API may do."""

from __future__ import annotations

from typing import Literal, get_args

from ncfm_core.errors import NcfmError

Scope = Literal["read", "submit", "admin"]
"""`read` looks, `submit` also posts and changes what is its own, `admin` changes everything."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Each one holds those before it."""


class KeyProblem(NcfmError):
    """A key cannot be made or changed as asked."""

    code = "invalid_key"


def scope_of(name: str) -> Scope:
    """A scope by its name.

    Raises:
        KeyProblem: there is none of that name.
    """
    found = next((scope for scope in SCOPES if scope == name), None)
    if found is None:
        raise KeyProblem.of("scope", name, "there is no such scope", f"Choose one of: {', '.join(SCOPES)}.")
    return found
