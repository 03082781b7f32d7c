"""Which route a request is for, as a template without ids: also of one that was refused before any route saw it."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

UNMATCHED = "unmatched"


def route_template(scope: Scope) -> str:
    """The route of a request, as `/jobs/{id}`; `unmatched` where there is none."""
    found = getattr(scope.get("route"), "path_format", None)
    return str(found) if found is not None else _match(scope)[0]


def target_of(scope: Scope) -> str:
    """The id in a request's path; empty where it has none."""
    if "path_params" in scope:
        return str(scope["path_params"].get("id", ""))
    return _match(scope)[1]


def _match(scope: Scope) -> tuple[str, str]:
    """Template and id of the first route of the path; that of the method, where there is one."""
    routes: Sequence[BaseRoute] = scope["app"].state.routes
    # A copy: whoever serves the request later finds nothing of this.
    asked = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
    found = (UNMATCHED, "")
    for route in routes:
        match, values = route.matches(asked)
        if match is Match.NONE:
            continue
        seen = str(getattr(route, "path_format", UNMATCHED)), str(values.get("path_params", {}).get("id", ""))
        if match is Match.FULL:
            return seen
        found = seen if found[0] == UNMATCHED else found
    return found
