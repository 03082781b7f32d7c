"""A parameter that no route knows is refused: what is misspelt would otherwise be left out without a word."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from ncfm_core.catalog import nearest
from ncfm_core.errors import Problem, shorten
from service.api.errors import MAX_ERRORS, InvalidParameter

MAX_NAME_CHARS = 64
"""Of a name that is compared with ours: none is nearly as long."""


async def refuse_unknown(request: Request) -> None:
    """Dependency of every route.

    Raises:
        InvalidParameter: the query has parameters that the route does not declare.
    """
    if not request.query_params:
        return
    route = request.scope.get("route")
    known = tuple(_declared(route.dependant)) if isinstance(route, APIRoute) else ()
    unknown = [name for name in request.query_params if name not in known][:MAX_ERRORS]
    if unknown:
        raise InvalidParameter(*(_problem(name, request.query_params[name], known) for name in unknown))


def _declared(dependant: Dependant) -> Iterator[str]:
    yield from (parameter.alias for parameter in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _declared(inner)


def _problem(name: str, value: str, known: tuple[str, ...]) -> Problem:
    hint = nearest(name[:MAX_NAME_CHARS].lower(), known) if known else "Leave it out: there are none here."
    return Problem(name, shorten(value), "unknown parameter", hint)
