"""What routes are handed: the store, the storage root, the job that a path names."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Path, Request

from ncfm_core.errors import Problem, shorten
from service.api.errors import NotFound
from service.jobs import Job
from service.store import Store
from worker.storage import Storage

_JOB_ID = re.compile(r"[0-9a-z]{26}")


def _store(request: Request) -> Store:
    store = request.app.state.store
    assert isinstance(store, Store)
    return store


def _storage(request: Request) -> Storage:
    storage = request.app.state.storage
    assert isinstance(storage, Storage)
    return storage


StoreDep = Annotated[Store, Depends(_store)]
StorageDep = Annotated[Storage, Depends(_storage)]


def _job(job_id: Annotated[str, Path(alias="id", description="Id of the job.")], store: StoreDep) -> Job:
    job = store.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise NotFound(Problem("id", shorten(job_id), "there is no such job", "GET /jobs lists all."))
    return job


JobDep = Annotated[Job, Depends(_job)]
