"""Route: run a job again, as a new job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import JsonValue

from ncfm_core.catalog import nearest
from ncfm_core.errors import Problem, SpecError, shorten
from service.api.changes import document_body
from service.api.context import CallerDep, JobDep, StoreDep
from service.api.envelope import ENVELOPE_SCHEMA, merged, read_envelope
from service.api.jobs import MADE, answered, keep_new
from service.api.models import JobBody
from service.api.once import IdempotencyHeader, idempotency_key
from service.api.openapi import problems
from service.api.sources import SourcesDep
from service.api.submission import read_optional

router = APIRouter(tags=["jobs"])

_KEYS = ("overrides", *ENVELOPE_SCHEMA)
_MAX_DEPTH = 32
_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "overrides": {
            "type": "object",
            "description": "Merge patch (RFC 7396) of what was asked for: null leaves a field to the preset.",
        },
        **{
            name: {key: value for key, value in schema.items() if key != "default"}
            for name, schema in ENVELOPE_SCHEMA.items()
        },
    },
}


async def _wishes(request: Request) -> dict[str, JsonValue]:
    return await read_optional(request)


@router.post(
    "/jobs/{id}/rerun",
    status_code=201,
    responses=problems(400, 404, 413, 415, 422, 503, 507) | MADE,
    openapi_extra=document_body(_SCHEMA, required=False),
    summary="Run again",
)
def rerun_job(
    document: Annotated[dict[str, JsonValue], Depends(_wishes)],
    job: JobDep,
    store: StoreDep,
    caller: CallerDep,
    sources: SourcesDep,
    response: Response,
    key: IdempotencyHeader = None,
) -> JobBody:
    """A new job from what this one was asked for, resolved anew. It names this one as its parent."""
    operation = f"POST /jobs/{job.id}/rerun"
    once = idempotency_key(key, owner=caller.owner, operation=operation, document=document)
    if once is not None and (made := store.made_by(once)) is not None:
        return answered(store, made, response, is_new=False)
    unknown = [name for name in document if name not in _KEYS]
    if unknown:
        raise SpecError(
            *(Problem(name, shorten(document[name]), "unknown key", nearest(name, _KEYS)) for name in unknown)
        )
    envelope, overrides = read_envelope(document), document.get("overrides", {})
    if not isinstance(overrides, dict):
        raise SpecError.of("overrides", overrides, "not an object", 'Try {"seed": 1}.')
    requested = merge_patch(job.requested, overrides)
    sources.check({**requested, "labels": document.get("labels")})
    return keep_new(
        store,
        caller,
        requested,
        sources=sources,
        once=once,
        priority=job.priority if envelope.priority is None else envelope.priority,
        labels=job.labels if envelope.labels is None else merged({}, envelope.labels),
        response=response,
        parent_id=job.id,
    )


def merge_patch(
    target: Mapping[str, JsonValue], patch: Mapping[str, JsonValue], *, depth: int = 0
) -> dict[str, JsonValue]:
    """A document with a merge patch applied (RFC 7396).

    Raises:
        SpecError: the patch is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise SpecError.of("overrides", None, f"nested deeper than {_MAX_DEPTH} levels", "A spec needs five.")
    result = dict(target)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            below = result.get(name)
            result[name] = merge_patch(below if isinstance(below, dict) else {}, value, depth=depth + 1)
        else:
            result[name] = value
    return result
