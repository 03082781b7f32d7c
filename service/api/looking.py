"""How one job is shown, and the ETag that says whether it still looks so."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from typing import Annotated

from fastapi import Header
from starlette.convertors import StringConvertor, register_url_convertor

from service.api.errors import ApiError
from service.api.models import JobBody
from service.jobs import Job, State
from service.store import Store

JOB_PATH = "/jobs/{id:job}"
"""Path of one job: not of what has a name of its own beside the ids."""


class _JobConvertor(StringConvertor):
    regex = "(?!validate$)[^/]+"


register_url_convertor("job", _JobConvertor())

IfNoneMatch = Annotated[str | None, Header(description="An ETag: 304 where the job still looks so.")]
IfMatch = Annotated[str | None, Header(description="An ETag: 412 where the job has been changed since.")]


class Stale(ApiError):
    """The job was changed since it was read."""

    code = "stale"
    status = HTTPStatus.PRECONDITION_FAILED


def show(store: Store, job: Job) -> JobBody:
    """The job with its place in the queue."""
    return JobBody.of(job, position=store.position(job) + 1 if job.state is State.QUEUED else None)


def etag_of(job: Job, body: JobBody) -> str:
    """The version of the job, and a digest of all that is shown: progress and place change without a new version."""
    return f'"{job.version}-{hashlib.sha256(body.model_dump_json().encode()).hexdigest()[:16]}"'


def names(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match has the ETag."""
    return any(given.strip().removeprefix("W/") in (etag, "*") for given in (header or "").split(","))


def check_match(header: str | None, job: Job) -> None:
    """Refuse a change of a job that another version of it was read before; its progress does not matter.

    Raises:
        Stale: the job has another version than the one in If-Match.
    """
    if header is None:
        return
    versions = {given.strip().removeprefix("W/").strip('"').partition("-")[0] for given in header.split(",")}
    if not versions & {str(job.version), "*"}:
        raise Stale.of("If-Match", header, "the job has been changed since", f"GET /jobs/{job.id} again.")
