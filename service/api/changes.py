"""Routes: cancel a job, change it, take it out of the lists."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ncfm_core.catalog import nearest
from ncfm_core.errors import Problem, SpecError, StorageError, shorten
from service.api.context import CallerDep, JobDep, StorageDep, StoreDep, may_change
from service.api.envelope import ENVELOPE_SCHEMA, merged, read_envelope
from service.api.errors import NotFound, NotReady
from service.api.faults import body_problem
from service.api.looking import JOB_PATH, IfMatch, check_match, etag_of, show
from service.api.models import JobBody
from service.api.openapi import problems
from service.api.sources import SourcesDep
from service.api.submission import read_optional, read_submission
from service.jobs import CancelRequest, Job, Reason, State, cancel_move
from service.store import Actor, Store
from worker.records import checkpoint_root, now
from worker.resuming import marks_of

router = APIRouter(tags=["jobs"])

CANCELLED_BY = "cancelled by request"


class CancelBody(BaseModel):
    """How a job shall end."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    mode: Literal["graceful", "force"] = "graceful"
    """`graceful` lets the driver end at its next step; `force` stops it at once."""
    checkpoint: bool = False
    """Whether a checkpoint is taken before, and kept for a while: a rerun of the job goes on from it."""
    grace_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a graceful end may take before the driver is stopped."""


def document_body(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads the body itself."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


async def _cancel_body(request: Request) -> CancelBody:
    document = await read_optional(request)
    try:
        return CancelBody.model_validate(document)
    except ValidationError as error:
        known = tuple(CancelBody.model_fields)
        raise SpecError(*(body_problem(details, known) for details in error.errors())) from None


@router.post(
    "/jobs/{id}/cancel",
    status_code=202,
    responses=problems(400, 404, 409, 413, 415, 422, 503, 507)
    | {200: {"description": "It is cancelled or being cancelled that way already", "model": JobBody}},
    openapi_extra=document_body(CancelBody.model_json_schema(), required=False),
    summary="Cancel",
)
def cancel_job(
    wish: Annotated[CancelBody, Depends(_cancel_body)],
    job: JobDep,
    store: StoreDep,
    caller: CallerDep,
    response: Response,
) -> JobBody:
    """Ask for the end of a job. It is `cancelled` once nothing of it is known to be left; at once while it is queued.

    Without a body the end is graceful. A second request may only make a graceful end a forced one.
    """
    may_change(caller, job)
    request = CancelRequest(**wish.model_dump(), requested_at=now())
    asked, is_new = _changed(store, job, lambda current: _cancel(store, current, request, caller.actor))
    if not is_new:
        response.status_code = 200
    return show(store, asked)


def _cancel(store: Store, job: Job, request: CancelRequest, actor: Actor) -> Job | None:
    """One try to move a job towards its end: the job itself where there is nothing to do, None where it was changed meanwhile."""
    to = cancel_move(job)
    if to is not None:
        return store.move(job, to, reason=Reason.REQUESTED, message=CANCELLED_BY, actor=actor, cancel=request)
    is_forced = job.cancel is not None and job.cancel.mode == "force"
    if job.state is State.CANCELLED or request.mode != "force" or is_forced:
        return job
    if job.cancel is not None:
        # What the first one asked for is kept: its checkpoint may be there already.
        request = request.model_copy(update={"checkpoint": request.checkpoint or job.cancel.checkpoint})
    return store.note(job, "changed", {"cancel": {"mode": "force"}}, actor=actor, cancel=request)


def _changed(store: Store, job: Job, change: Callable[[Job], Job | None]) -> tuple[Job, bool]:
    """Change a job, however often others change it meanwhile.

    Args:
        store: that holds it.
        job: as it was read.
        change: one try: gives the job as it was where there is nothing to change, and None where somebody was faster.

    Returns:
        The job as it now is, and whether it was changed.

    Raises:
        NotFound: it has been deleted meanwhile.
    """
    current: Job | None = job
    while current is not None:
        changed = change(current)
        if changed is not None:
            return changed, changed is not current
        current = store.get(job.id)
    raise NotFound(Problem("id", shorten(job.id), "there is no such job", "GET /jobs lists all."))


@router.patch(
    JOB_PATH,
    responses=problems(400, 404, 409, 412, 413, 415, 422, 503, 507)
    | {200: {"description": "The job", "headers": {"ETag": {"schema": {"type": "string"}}}}},
    openapi_extra=document_body(
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "priority": {key: value for key, value in ENVELOPE_SCHEMA["priority"].items() if key != "default"},
                "labels": {
                    key: value
                    for key, value in ENVELOPE_SCHEMA["labels"].items()
                    if key not in ("default", "description")
                }
                | {
                    "additionalProperties": {
                        "anyOf": [ENVELOPE_SCHEMA["labels"]["additionalProperties"], {"type": "null"}]
                    },
                    "description": "Laid over those that it has; null takes one away.",
                },
            },
        }
    ),
    summary="Change",
)
def change_job(
    document: Annotated[dict[str, JsonValue], Depends(read_submission)],
    job: JobDep,
    store: StoreDep,
    caller: CallerDep,
    sources: SourcesDep,
    response: Response,
    if_match: IfMatch = None,
) -> JobBody:
    """Change the priority of a job that waits in the queue, or the labels of any job."""
    may_change(caller, job)
    unknown = [key for key in document if key not in ENVELOPE_SCHEMA]
    if unknown:
        known = tuple(ENVELOPE_SCHEMA)
        raise SpecError(
            *(Problem(key, shorten(document[key]), "cannot be changed", nearest(key, known)) for key in unknown)
        )
    sources.check(document)
    envelope = read_envelope(document, may_remove=True)

    def change(current: Job) -> Job | None:
        check_match(if_match, current)
        changes: dict[str, Any] = {}
        if envelope.priority is not None and envelope.priority != current.priority:
            if current.state is not State.QUEUED:
                hint = "Priority counts in the queue alone."
                raise NotReady.of("state", str(current.state), "the job is not queued any more", hint)
            changes["priority"] = envelope.priority
        labels = merged(current.labels, envelope.labels or {})
        if labels != current.labels:
            changes["labels"] = labels
        return store.note(current, "changed", changes, actor=caller.actor, **changes) if changes else current

    changed, _ = _changed(store, job, change)
    body = show(store, changed)
    response.headers["ETag"] = etag_of(changed, body)
    return body


@router.delete(
    JOB_PATH,
    status_code=204,
    responses=problems(404, 409, 412, 422, 503, 507),
    response_class=Response,
    summary="Delete",
)
def delete_job(job: JobDep, store: StoreDep, storage: StorageDep, caller: CallerDep, if_match: IfMatch = None) -> None:
    """Take a job that has ended out of the lists. Its files go with the next collection of garbage, its checkpoints at once."""
    may_change(caller, job)

    def change(current: Job) -> Job | None:
        check_match(if_match, current)
        if not current.state.is_terminal:
            hint = f"POST /jobs/{job.id}/cancel ends it first."
            raise NotReady.of("state", str(current.state), f"a {current.state} job cannot be deleted", hint)
        return store.note(current, "changed", {"deleted": True}, actor=caller.actor, deleted_at=now())

    _changed(store, job, change)
    # Where the storage is away, the collection of garbage finds them as those of a deleted job.
    with suppress(StorageError):
        paths = storage.list(checkpoint_root(job.id))
        storage.delete([*paths, *marks_of(job.id, paths)])
