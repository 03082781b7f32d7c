"""Cancel, change, delete and rerun a job."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ncfm_core.errors import StorageError
from service.jobs import Reason, State
from service.store import Store
from tests.service.world import move
from worker.storage import Storage

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}


def submit(client: httpx.Client, **more: Any) -> str:
    reply = client.post("/jobs", json=SMALLEST | more)
    assert reply.status_code == 201, reply.text
    made: str = reply.json()["id"]
    return made


def fields(reply: httpx.Response) -> list[str]:
    assert reply.headers["Content-Type"] == "application/problem+json", reply.text
    return [error["field"] for error in reply.json()["errors"]]


def test_cancel_when_it_says_how_keeps_the_wish(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING)
    wish = {"mode": "graceful", "checkpoint": True, "grace_seconds": 120}
    reply = client.post(f"/jobs/{job_id}/cancel", json=wish)
    assert (reply.status_code, reply.json()["state"]) == (202, "cancelling")
    assert wish.items() <= reply.json()["cancel"].items()
    job = api_store.get(job_id)
    assert job is not None and job.cancel is not None and job.cancel.checkpoint


def test_cancel_when_asked_twice_may_only_become_forced(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING)
    path = f"/jobs/{job_id}/cancel"
    assert client.post(path).json()["cancel"]["mode"] == "graceful"
    assert client.post(path, json={"checkpoint": True}).status_code == 200
    forced = client.post(path, json={"mode": "force"})
    assert (forced.status_code, forced.json()["cancel"]["mode"]) == (202, "force")
    assert client.post(path, json={"mode": "force"}).status_code == 200
    back = client.post(path, json={"mode": "graceful"})
    assert (back.status_code, back.json()["cancel"]["mode"]) == (200, "force")
    types = [event["type"] for event in client.get(f"/jobs/{job_id}/events").json()["items"]]
    assert types == ["created", "state", "state", "state", "changed"]


def test_cancel_when_forced_keeps_the_wish_for_a_checkpoint(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING)
    client.post(f"/jobs/{job_id}/cancel", json={"checkpoint": True})
    forced = client.post(f"/jobs/{job_id}/cancel", json={"mode": "force"}).json()["cancel"]
    assert (forced["mode"], forced["checkpoint"]) == ("force", True)


@pytest.mark.parametrize("reason", [Reason.WORKER_LOST, Reason.CLUSTER_LOST, Reason.STORAGE_FULL])
def test_cancel_when_recovering_waits_until_nothing_of_it_is_left(
    client: httpx.Client, api_store: Store, reason: Reason
) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING, State.RUNNING, State.RECOVERING, reason=reason)
    reply = client.post(f"/jobs/{job_id}/cancel")
    assert (reply.status_code, reply.json()["state"]) == (202, "cancelling")


def test_cancel_when_queued_is_over_at_once(client: httpx.Client) -> None:
    reply = client.post(f"/jobs/{submit(client)}/cancel")
    assert (reply.status_code, reply.json()["state"]) == (202, "cancelled")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"mode": "softly"}, "mode"),
        ({"grace_seconds": -1}, "grace_seconds"),
        ({"grace_seconds": 3601}, "grace_seconds"),
        ({"checkpoint": "yes"}, "checkpoint"),
        ({"grace": 5}, "grace"),
        ([], ""),
    ],
)
def test_cancel_when_the_wish_is_not_legal_names_it(client: httpx.Client, body: Any, field: str) -> None:
    reply = client.post(f"/jobs/{submit(client)}/cancel", json=body)
    assert (reply.status_code, fields(reply)) == (422, [field])


def test_change_when_queued_sets_priority_and_merges_labels(client: httpx.Client, api_store: Store) -> None:
    first, second = submit(client, labels={"a": "1", "b": "2"}), submit(client)
    before = client.get(f"/jobs/{second}").json()["queue"]["position"]
    reply = client.patch(f"/jobs/{second}", json={"priority": 100, "labels": {"c": "3"}})
    assert reply.status_code == 200, reply.text
    assert (reply.json()["priority"], reply.json()["labels"]) == (100, {"c": "3"})
    assert reply.json()["queue"]["position"] < before
    changed = client.patch(f"/jobs/{first}", json={"labels": {"a": None, "b": "5"}}).json()
    assert changed["labels"] == {"b": "5"}
    event = client.get(f"/jobs/{first}/events").json()["items"][-1]
    assert (event["type"], event["data"], event["actor"]) == ("changed", {"labels": {"b": "5"}}, "local")
    version = api_store.get(first)
    client.patch(f"/jobs/{first}", json={"labels": {"b": "5"}})
    assert api_store.get(first) == version


def test_change_when_not_queued_leaves_priority_alone(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING)
    reply = client.patch(f"/jobs/{job_id}", json={"priority": 60})
    assert (reply.status_code, fields(reply)) == (409, ["state"])
    assert client.patch(f"/jobs/{job_id}", json={"priority": 50, "labels": {"a": "b"}}).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"priority": 500}, "priority"),
        ({"state": "succeeded"}, "state"),
        ({"labels": {"A": "x"}}, "labels.A"),
        ({"labels": {f"k{i}": "x" for i in range(33)}}, "labels"),
    ],
)
def test_change_when_not_legal_names_the_field(client: httpx.Client, body: Any, field: str) -> None:
    reply = client.patch(f"/jobs/{submit(client)}", json=body)
    assert (reply.status_code, fields(reply)) == (422, [field])


def test_change_when_a_label_holds_a_secret_is_refused(client: httpx.Client) -> None:
    job_id = submit(client)
    labels = {"from": "https://ann:hunter2@host/data.tar"}
    for refused in (
        client.patch(f"/jobs/{job_id}", json={"labels": labels}),
        client.post(f"/jobs/{job_id}/rerun", json={"labels": labels}),
        client.post("/jobs", json=SMALLEST | {"labels": labels}),
    ):
        assert refused.status_code == 422
        assert fields(refused) == ["labels.from"]
        assert "hunter2" not in refused.text


def test_change_when_the_job_was_changed_since_is_refused(client: httpx.Client) -> None:
    job_id = submit(client)
    etag = client.get(f"/jobs/{job_id}").headers["ETag"]
    reply = client.patch(f"/jobs/{job_id}", json={"labels": {"a": "1"}}, headers={"If-Match": etag})
    assert reply.status_code == 200
    stale = client.patch(f"/jobs/{job_id}", json={"labels": {"a": "2"}}, headers={"If-Match": etag})
    assert (stale.status_code, fields(stale)) == (412, ["If-Match"])
    fresh = {"If-Match": reply.headers["ETag"]}
    assert client.patch(f"/jobs/{job_id}", json={"labels": {"a": "2"}}, headers=fresh).status_code == 200


def test_delete_when_running_is_refused_with_the_way_out(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    move(api_store, job_id, State.STARTING)
    reply = client.delete(f"/jobs/{job_id}")
    assert reply.status_code == 409
    assert reply.json()["errors"][0]["hint"] == f"POST /jobs/{job_id}/cancel ends it first."
    assert client.get(f"/jobs/{job_id}").status_code == 200


def test_delete_when_ended_takes_it_out_of_the_lists(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client, labels={"gone": "yes"})
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert client.get(f"/jobs/{job_id}").status_code == 404
    assert client.delete(f"/jobs/{job_id}").status_code == 404
    assert client.get("/jobs", params={"label": "gone:yes"}).json()["items"] == []
    kept = api_store.get(job_id, deleted=True)
    assert kept is not None and kept.deleted_at is not None


def test_delete_removes_the_checkpoints_at_once(
    client: httpx.Client, api_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [submit(client) for _ in range(2)]
    for job_id in ids:
        client.post(f"/jobs/{job_id}/cancel", json={"checkpoint": True})
        api_storage.put(f"checkpoints/{job_id}/abc/1/0000000005.json", b"{}")
        api_storage.put(f"resumable/abc/{job_id}", b"\n")
    assert client.delete(f"/jobs/{ids[0]}").status_code == 204
    assert [api_storage.list(f"checkpoints/{job_id}") != [] for job_id in ids] == [False, True]
    assert api_storage.list("resumable") == [f"resumable/abc/{ids[1]}"]

    def away(self: Storage, prefix: str) -> list[str]:
        raise StorageError.of("storage", prefix, "cannot be listed", "")

    monkeypatch.setattr(Storage, "list", away)
    assert client.delete(f"/jobs/{ids[1]}").status_code == 204


def test_rerun_makes_a_new_job_with_the_changes(client: httpx.Client, api_store: Store) -> None:
    parent = submit(client, labels={"a": "1"}, priority=60, seed=3, method={"steps": 7})
    plain = client.post(f"/jobs/{parent}/rerun")
    assert plain.status_code == 201
    body = plain.json()
    assert (body["parent_id"], body["links"]["parent"]) == (parent, f"/jobs/{parent}")
    assert (body["labels"], body["priority"], body["spec"]["seed"]) == ({"a": "1"}, 60, 3)
    wishes = {"overrides": {"seed": 4, "method": {"steps": None, "reuse": 2}}, "priority": 10, "labels": {}}
    changed = client.post(f"/jobs/{parent}/rerun", json=wishes).json()
    assert changed["requested"] == SMALLEST | {"seed": 4, "method": {"reuse": 2}}
    assert (changed["labels"], changed["priority"], changed["spec"]["method"]["reuse"]) == ({}, 10, 2)
    assert changed["id"] not in (parent, body["id"])


def test_rerun_when_sent_again_under_its_key_makes_one_job(client: httpx.Client) -> None:
    parent = submit(client)
    key = {"Idempotency-Key": "rerun-1"}
    first, again = (client.post(f"/jobs/{parent}/rerun", headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotency-Replayed"] == "true"
    assert client.post(f"/jobs/{parent}/rerun", json={"priority": 1}, headers=key).status_code == 422
    other = client.post(f"/jobs/{submit(client)}/rerun", headers=key)
    assert other.json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"overrides": {"ipc": 0}}, "ipc"),
        ({"overrides": {"dataset": None}}, "dataset"),
        ({"overrides": [1]}, "overrides"),
        ({"override": {}}, "override"),
        ({"overrides": {"priority": 5}}, "priority"),
        ({"labels": {"a": None}}, "labels.a"),
    ],
)
def test_rerun_when_not_legal_names_the_field(client: httpx.Client, body: Any, field: str) -> None:
    reply = client.post(f"/jobs/{submit(client)}/rerun", json=body)
    assert (reply.status_code, fields(reply)) == (422, [field])


def test_attempts_tell_how_each_ended(client: httpx.Client, api_store: Store) -> None:
    job_id = submit(client)
    job = move(api_store, job_id, State.STARTING, State.RUNNING, State.RECOVERING)
    api_store.move(job, State.STARTING, attempt=2)
    items = client.get(f"/jobs/{job_id}/attempts").json()["items"]
    assert [(item["number"], item["outcome"]) for item in items] == [(1, "lost"), (2, None)]
