"""Every error as one shape: RFC 9457 `application/problem+json`, with the field, its value and the way out. Never a traceback."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from ncfm_core.errors import NcfmError, Problem, SpecError, StorageError, shorten
from service.api.faults import parameter_problem
from service.archives import ArchiveRefused
from service.database import StoreError, StoreFullError
from service.jobs import IllegalMove
from service.store import KeyReused
from worker.redaction import redact

logger = logging.getLogger("ncfm.api")

MAX_ERRORS = 50
"""A body can be wrong in thousands of places: the first ones are enough to mend it."""
MAX_FIELD_CHARS = 200
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class ApiError(NcfmError):
    """A request that cannot be served as it is."""

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    headers: Mapping[str, str] = {}
    """Headers that belong to the answer."""


class MalformedBody(ApiError):
    """The body is not a JSON document."""

    code = "malformed_body"


class ForeignRequest(ApiError):
    """The request comes from a page of another site, or to a name that is not ours."""

    code = "foreign_request"
    status = HTTPStatus.FORBIDDEN


class Unauthorized(ApiError):
    """A key is needed here, and none that is good came."""

    code = "unauthorized"
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(ApiError):
    """The key is good, but not for this."""

    code = "forbidden"
    status = HTTPStatus.FORBIDDEN


class TooManyRequests(ApiError):
    """More requests than a caller may make."""

    code = "too_many_requests"
    status = HTTPStatus.TOO_MANY_REQUESTS


class HeadersTooLarge(ApiError):
    """More headers, or longer ones, than any client of ours sends."""

    code = "headers_too_large"
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class Draining(ApiError):
    """This process is about to end."""

    code = "draining"
    status = HTTPStatus.SERVICE_UNAVAILABLE


class NotFound(ApiError):
    """There is no such thing."""

    code = "not_found"
    status = HTTPStatus.NOT_FOUND


class NotReady(ApiError):
    """It is not there, because the job has not (or not that way) come to its end."""

    code = "not_ready"
    status = HTTPStatus.CONFLICT


class Gone(ApiError):
    """It was there, and its files have been removed or damaged since."""

    code = "gone"
    status = HTTPStatus.GONE


class BodyTooLarge(ApiError):
    """The body is larger than it may be."""

    code = "body_too_large"
    status = HTTPStatus(413)


class RequestTimeout(ApiError):
    """The rest of a request did not come."""

    code = "request_timeout"
    status = HTTPStatus.REQUEST_TIMEOUT


class DigestMismatch(ApiError):
    """The body is not the one whose sum was given."""

    code = "digest_mismatch"
    status = HTTPStatus(422)


class Conflict(ApiError):
    """Something else stands in the way."""

    code = "conflict"
    status = HTTPStatus.CONFLICT


class InsufficientStorage(ApiError):
    """There is no room."""

    code = "storage_full"
    status = HTTPStatus.INSUFFICIENT_STORAGE


class UnsupportedMediaType(ApiError):
    """The body is not declared to be what is taken here."""

    code = "unsupported_media_type"
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class RangeNotSatisfiable(ApiError):
    """The range lies outside the file."""

    code = "range_not_satisfiable"
    status = HTTPStatus(416)


class InvalidParameter(ApiError):
    """A parameter of the query is not legal."""

    code = "invalid_parameter"
    status = HTTPStatus(422)


_STATUS: Mapping[type[NcfmError], HTTPStatus] = {
    SpecError: HTTPStatus(422),
    ArchiveRefused: HTTPStatus(422),
    IllegalMove: HTTPStatus.CONFLICT,
    KeyReused: HTTPStatus(422),
    StoreFullError: HTTPStatus.INSUFFICIENT_STORAGE,
    StoreError: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageError: HTTPStatus.SERVICE_UNAVAILABLE,
}


class ProblemItem(BaseModel):
    """One thing that is wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    field: str
    """Dotted path of the field or the name of the parameter; empty for the document as a whole."""
    value: str
    """The offending value as text, shortened; empty where there is none."""
    message: str
    """What is wrong."""
    hint: str
    """The way out."""


class ProblemDocument(BaseModel):
    """RFC 9457, with the single faults in `errors`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """URN of the kind of problem."""
    title: str
    status: int
    detail: str
    """All of it in one text, for a person."""
    instance: str
    """Path of the request."""
    code: str
    """Stable name of the kind of problem, for programs."""
    request_id: str
    """Also in the X-Request-ID header and in the log."""
    errors: list[ProblemItem]


def problem_response(
    scope: Scope,
    status: HTTPStatus,
    code: str,
    problems: Sequence[Problem],
    *,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document as a response."""
    request_id = scope.get("state", {}).get("request_id", "")
    problems = [_public(problem) for problem in problems[:MAX_ERRORS]]
    document = ProblemDocument(
        type=f"urn:ncfm:problem:{code}",
        title=status.phrase,
        status=status,
        detail="\n".join(str(problem) for problem in problems),
        instance=redact(scope["path"]),
        code=code,
        request_id=request_id,
        errors=[ProblemItem(**problem.as_dict()) for problem in problems],
    )
    return Response(
        # ASCII, so that not even half a surrogate pair from a request can break the answer.
        json.dumps(document.model_dump()),
        status_code=status,
        media_type="application/problem+json",
        headers={"X-Request-ID": request_id, **(headers or {})},
    )


def _public(problem: Problem) -> Problem:
    """A problem as anybody may read it."""
    field, value = redact(problem.field[:MAX_FIELD_CHARS]), redact(problem.value)
    return replace(problem, field=field, value=value, message=redact(problem.message), hint=redact(problem.hint))


def error_response(scope: Scope, error: NcfmError) -> Response:
    """An error of ours as a response."""
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), HTTPStatus(500))
    headers: Mapping[str, str] = {}
    if isinstance(error, ApiError):
        status, headers = error.status, error.headers
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": "2", **headers}
    return problem_response(scope, status, error.code, error.problems, headers=headers)


def install(app: FastAPI) -> None:
    """Replace every error body of the framework by ours."""

    async def on_ncfm_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, NcfmError)
        return error_response(request.scope, error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _framework_problem(request, error, app.router.routes)

    async def on_invalid_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = [parameter_problem(details) for details in error.errors()]
        return problem_response(request.scope, HTTPStatus(422), InvalidParameter.code, problems)

    async def on_bug(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        extra = {"action": "request_failed", "request_id": request_id}
        logger.error("request %s failed: %s", request_id, request.url.path, extra=extra, exc_info=error)
        problem = Problem("", "", "the service failed on this request", "Its log names this request_id.")
        return problem_response(request.scope, HTTPStatus(500), "internal", [problem])

    app.add_exception_handler(NcfmError, on_ncfm_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(Exception, on_bug)


def _framework_problem(request: Request, error: HTTPException, routes: Sequence[BaseRoute]) -> Response:
    status = HTTPStatus(error.status_code)
    if status == HTTPStatus.NOT_FOUND:
        problem = Problem("path", shorten(request.url.path), "there is nothing here", "GET /openapi.json lists all.")
        return problem_response(request.scope, status, NotFound.code, [problem])
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_allowed_methods(request.scope, routes))
        problem = Problem("method", shorten(request.method), "not allowed here", f"Allowed: {allowed}.")
        return problem_response(request.scope, status, "method_not_allowed", [problem], headers={"Allow": allowed})
    code = status.phrase.lower().replace(" ", "_")
    return problem_response(
        request.scope,
        status,
        code,
        [Problem("", "", str(error.detail), "GET /openapi.json has what is taken here.")],
        headers=error.headers,
    )


def _allowed_methods(scope: Scope, routes: Sequence[BaseRoute]) -> list[str]:
    """All methods of a path, over all its routes: the framework names those of the first route only."""
    allowed = [
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return [*allowed, "HEAD"] if "GET" in allowed and "HEAD" not in allowed else allowed
