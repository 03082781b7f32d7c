"""Rows that a later release kept, or that are damaged: they are passed over where there are others, and named where asked for."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from ncfm_core.submission import resolve
from service.doctor import examine
from service.jobs import Job, Reason, State, new_job_id
from service.store import Store
from service.tables import jobs
from service.uploads import Upload, user_of
from worker.records import now
from worker.storage import Storage

LATER: dict[str, object] = {"reason": "of_a_later_release"}


def add(store: Store, *, damage: dict[str, object], **changes: object) -> Job:
    """A job whose row is changed past the store."""
    spec = resolve({"dataset": "digits", "ipc": 1}).document()
    job = Job(id=new_job_id(), requested={}, spec=spec, created_at=now(), labels={"from": "later"})
    job = store.add(job.model_copy(update=changes))
    if damage:
        with store.writing() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(damage))
    return job


def remove(store: Store, *added: Job) -> None:
    """Out of the lists of other tests."""
    with store.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id.in_([job.id for job in added])).values(deleted_at=now()))


@pytest.mark.parametrize("damage", [LATER, {"progress": {"stage": 1}}, {"spec": {}}])
def test_list_when_a_row_cannot_be_read_leaves_it_out_and_goes_on_behind_it(
    client: httpx.Client, api_store: Store, caplog: pytest.LogCaptureFixture, damage: dict[str, object]
) -> None:
    older, bad, newer = (add(api_store, damage=each) for each in ({}, damage, {}))
    shown: list[str] = []
    params = {"label": "from:later", "limit": "1"}
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            page = client.get("/jobs", params=params).raise_for_status().json()
            shown += [item["id"] for item in page["items"]]
            if page["next"] is None:
                break
            params["cursor"] = page["next"]
    assert shown == [newer.id, older.id]
    assert any(bad.id in record.getMessage() for record in caplog.records)
    remove(api_store, older, bad, newer)


@pytest.mark.parametrize("path", ["", "/events", "/artifacts", "/attempts"])
def test_look_when_the_row_cannot_be_read_names_the_way_out(client: httpx.Client, api_store: Store, path: str) -> None:
    bad = add(api_store, damage=LATER)
    reply = client.get(f"/jobs/{bad.id}{path}")
    assert (reply.status_code, reply.json()["code"]) == (500, "job_unreadable")
    [error] = reply.json()["errors"]
    assert bad.id in error["value"] and "of_a_later_release" in error["message"] and "ncfm doctor" in error["hint"]
    assert "Traceback" not in reply.text
    remove(api_store, bad)


def test_metrics_when_a_state_is_of_a_later_release_count_the_others(client: httpx.Client, api_store: Store) -> None:
    bad = add(api_store, damage={"state": "paused"})
    assert client.get("/metrics").status_code == 200
    assert set(api_store.counts()) == set(State)
    remove(api_store, bad)


@pytest.mark.parametrize("damage", [LATER, {"state": "paused"}, {"spec": {"dataset": "lost"}}, {"spec": []}])
def test_user_of_when_the_row_cannot_be_read_takes_the_job_for_one(tmp_path: Path, damage: dict[str, object]) -> None:
    store = Store(f"sqlite:///{tmp_path}/ncfm.db")
    upload = Upload(id="a" * 64, owner="local", name="birds", size=1, facts={"kind": "zip"}, created_at=now())
    other = Upload(id="b" * 64, owner="local", name="fish", size=1, facts={"kind": "zip"}, created_at=now())
    spec = resolve({"dataset": {"name": "imagefolder", "uri": upload.uri, "image_size": 32}, "ipc": 1}).document()
    bad = add(store, damage=damage, spec=spec)
    used = user_of(store, upload)
    assert used is not None and used[0] == bad.id
    # One whose data can be read needs its own upload alone.
    assert (user_of(store, other) is None) == ("spec" not in damage)
    with store.writing() as connection:
        connection.execute(update(jobs).values(state=State.FAILED, reason=LATER["reason"]))
    assert user_of(store, upload) is None
    store.close()


def test_doctor_when_a_row_cannot_be_read_names_it(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/ncfm.db")
    add(store, damage={"reason": Reason.CLUSTER_FULL})
    bad = [add(store, damage=LATER), add(store, damage={"spec": {}})]
    found = [each for each in examine(store, Storage(str(tmp_path / "storage"))) if each.check == "rows"]
    assert {each.subject for each in found} == {job.id for job in bad}
    assert all(each.level == "error" and each.hint for each in found)
    store.close()
