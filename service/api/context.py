"""What routes are handed: the store, the storage root, who asks, the job that a path names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request

from ncfm_core.errors import Problem, shorten
from service.api.errors import Forbidden, NotFound
from service.api.streams import Streams
from service.jobs import Job
from service.scopes import Scope
from service.store import Actor, Store
from worker.storage import Storage

_JOB_ID = re.compile(r"[0-9a-z]{26}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as the guard found out."""

    owner: str
    """Id of the API key; `local` where none is needed."""
    scopes: frozenset[Scope]
    """`read` looks, `submit` also posts and changes what is its own, `admin` changes everything."""
    request_id: str = ""
    address: str = ""
    """Where the request came from."""

    @property
    def actor(self) -> Actor:
        return Actor(self.owner if self.owner == LOCAL else f"key:{self.owner}", self.request_id)


LOCAL = "local"


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


def may_change(caller: Caller, job: Job) -> None:
    """Let a caller change a job: its own one with `submit`, any one with `admin`.

    Raises:
        Forbidden: the job is somebody else's, or the caller may only look.
    """
    check_owner(caller, job.owner, f"job {job.id}")


def check_owner(caller: Caller, owner: str, what: str) -> None:
    """Let a caller change what an owner has.

    Raises:
        Forbidden: it is somebody else's, or the caller may only look.
    """
    if "admin" not in caller.scopes:
        need_scope(caller, "submit")
        if owner != caller.owner:
            hint = "Use the owner's key, or one with scope admin."
            raise Forbidden.of("Authorization", caller.actor.name, f"{what} belongs to another key", hint)


def need_scope(caller: Caller, scope: Scope) -> None:
    """
    Raises:
        Forbidden: the caller lacks the scope.
    """
    if scope not in caller.scopes:
        hint = f"Use a key with it: `ncfm keys create --scope {scope}`."
        raise Forbidden.of("Authorization", caller.actor.name, f"this needs the scope {scope}", hint)


def _admin(caller: CallerDep) -> Caller:
    need_scope(caller, "admin")
    return caller


AdminDep = Annotated[Caller, Depends(_admin)]


def _job(job_id: Annotated[str, Path(alias="id", description="Id of the job.")], store: StoreDep) -> Job:
    job = store.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise NotFound(Problem("id", shorten(job_id), "there is no such job", "GET /jobs lists all."))
    return job


JobDep = Annotated[Job, Depends(_job)]
