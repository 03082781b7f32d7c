"""Route: who changed what."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import JsonValue

from service import auditing
from service.api.context import AdminDep, StoreDep
from service.api.models import Body
from service.api.openapi import problems

router = APIRouter(tags=["operation"])


class AuditItem(Body):
    """One thing that was done or tried."""

    id: int
    at: datetime
    actor: str
    """`local`, `key:<id>`, or `cli` for who has the database itself."""
    action: str
    """Method and route, as `POST /jobs/{id}/cancel`; of keys `keys.create`, `keys.revoke`, `keys.rotate`."""
    target: str
    """Id of what it was done to."""
    request_id: str
    address: str
    data: dict[str, JsonValue]
    """`status` of the answer, or what was given."""


class AuditList(Body):
    """Entries, newest first."""

    items: list[AuditItem]
    next: int | None
    """`before` for the next page, or null on the last one."""


@router.get("/audit", responses=problems(422, 503), summary="Who changed what")
def list_audit(
    caller: AdminDep,
    store: StoreDep,
    limit: Annotated[int, Query(ge=1, le=200, description="Most items of the page.")] = 50,
    before: Annotated[int | None, Query(ge=1, le=2**53, description="`next` of the page before.")] = None,
) -> AuditList:
    """Every request that changed something or tried to, and every change of a key. Needs the scope `admin`."""
    found = auditing.page(store, limit=limit + 1, before=before)
    page = found[:limit]
    return AuditList(
        items=[AuditItem(**{name: getattr(row, name) for name in AuditItem.model_fields}) for row in page],
        next=page[-1].id if len(found) > len(page) else None,
    )
