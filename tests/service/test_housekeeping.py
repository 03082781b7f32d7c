"""What is old goes, without anybody waiting for it."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import JsonValue
from sqlalchemy import func, select

from ncfm_core.submission import resolve
from service.controller.housekeeping import keep_house
from service.jobs import Job, new_job_id
from service.leases import acquire
from service.retention import Limits
from service.store import IdempotencyKey, Store
from service.tables import idempotency
from worker.records import now
from worker.storage import Storage

DOCUMENT: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1}


def keys(store: Store) -> int:
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(idempotency)).scalar_one())


@pytest.mark.parametrize("holder", ["we", "another"])
def test_old_rows_go_where_the_lease_is_ours(tmp_path: Path, holder: str) -> None:
    url = f"sqlite:///{tmp_path / 'ncfm.db'}"
    store = Store(url)
    old = Job(
        id=new_job_id(),
        requested=dict(DOCUMENT),
        spec=resolve(dict(DOCUMENT)).document(),
        created_at=now() - timedelta(days=4),
    )
    store.add_once(old, IdempotencyKey("local", "POST /jobs", "k", "f"))
    lease = acquire(store, "we", seconds=60)
    store.fence = lease.token if holder == "we" else lease.token + 1
    stop = threading.Event()
    asked: list[bool] = []

    def is_active() -> bool:
        asked.append(True)
        if len(asked) == 2:
            stop.set()
        return True

    storage = Storage(str(tmp_path / "storage"))
    keep_house(store, storage, Limits(), is_active=is_active, stop=stop, first_after_s=0.0, every_s=0.0)
    assert len(asked) == 2
    assert keys(store) == (0 if holder == "we" else 1)
    store.close()
