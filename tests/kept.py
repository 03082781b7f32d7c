"""All jobs of a store, for tests that compare them."""

from __future__ import annotations

from service.filtering import Filter
from service.jobs import Job
from service.listing import summaries
from service.store import Store

MANY = 1_000_000


def all_jobs(store: Store, wanted: Filter | None = None) -> list[Job]:
    """Newest first, without deleted ones."""
    rows = summaries(store, limit=MANY, wanted=wanted or Filter())
    return [job for row in rows if (job := store.get(row["id"])) is not None]
