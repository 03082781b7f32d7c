"""What routes are handed: the store, the storage root, who asks, the job that a path names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, Path, Request

from ncfm_core.errors import Problem, shorten
from service.api.errors import ApiError, NotFound
from service.api.streams import Streams
from service.jobs import Job
from service.store import Actor, Store
from worker.storage import Storage

_JOB_ID = re.compile(r"[0-9a-z]{26}")

Scope = Literal["read", "submit", "admin"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as the guard found out."""

    owner: str
    """Id of the API key; `local` where none is needed."""
    scopes: frozenset[Scope]
    """`read` looks, `submit` also posts and changes what is its own, `admin` changes everything."""
    request_id: str = ""

    @property
    def actor(self) -> Actor:
        return Actor(self.owner if self.owner == LOCAL else f"key:{self.owner}", self.request_id)


LOCAL = "local"


class Forbidden(ApiError):
    """The caller may not do this."""

    code = "forbidden"
    status = HTTPStatus.FORBIDDEN


def may_change(caller: Caller, job: Job) -> None:
    """Let pass who may change a job.

    Raises:
        Forbidden: the caller is neither its owner with the scope `submit`, nor an admin.
    """
    is_own = caller.owner == job.owner and "submit" in caller.scopes
    if not (is_own or "admin" in caller.scopes):
        hint = f"It takes the key that posted it ({job.owner}), or one with the scope admin."
        raise Forbidden.of("id", job.id, "the job is not yours to change", hint)


def _store(request: Request) -> Store:
    store = request.app.state.store
    assert isinstance(store, Store)
    return store


def _storage(request: Request) -> Storage:
    storage = request.app.state.storage
    assert isinstance(storage, Storage)
    return storage


def _caller(request: Request) -> Caller:
    caller = getattr(request.state, "caller", None)
    if isinstance(caller, Caller):
        return caller
    return Caller(LOCAL, frozenset({"read", "submit", "admin"}), request.state.request_id)


def _streams(request: Request) -> Streams:
    streams = request.app.state.streams
    assert isinstance(streams, Streams)
    return streams


CallerDep = Annotated[Caller, Depends(_caller)]
StoreDep = Annotated[Store, Depends(_store)]
StorageDep = Annotated[Storage, Depends(_storage)]
StreamsDep = Annotated[Streams, Depends(_streams)]


def _job(job_id: Annotated[str, Path(alias="id", description="Id of the job.")], store: StoreDep) -> Job:
    job = store.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise NotFound(Problem("id", shorten(job_id), "there is no such job", "GET /jobs lists all."))
    return job


JobDep = Annotated[Job, Depends(_job)]
