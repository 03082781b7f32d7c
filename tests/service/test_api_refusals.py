"""What is left of a refused request: a row in the audit where the key was good, and a line in the log that says what it was."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from service.api import create_app
from service.api.auth import Buckets
from service.keys import NO_KEY_S, Keys
from service.scopes import Scope
from service.settings import Settings
from service.store import Store
from service.tables import audit

SMALLEST = {"dataset": "digits", "ipc": 1}
NO_JOB = "0" * 26


class World:
    """An API with keys, whose notes can be read when it has ended."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self._settings = Settings(home=home, **settings)
        self.app = create_app(self._settings)
        self.keys = Keys(self.app.state.store)

    def key(self, scope: Scope) -> tuple[str, dict[str, str]]:
        """Id of a new key, and the header that has it."""
        key, token = self.keys.create("test", scope, expires_at=None)
        return key.id, {"Authorization": f"Bearer {token}"}

    def client(self) -> TestClient:
        return TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    def rows(self) -> list[tuple[str, str, str, int]]:
        """Actor, action, target and status of what was noted of requests."""
        with Store(self._settings.database).reading() as connection:
            found = connection.execute(select(audit).order_by(audit.c.id)).all()
        return [(row.actor, row.action, row.target, row.data["status"]) for row in found if "status" in row.data]


def test_refusal_for_want_of_a_scope_is_audited(tmp_path: Path) -> None:
    world = World(tmp_path)
    key_id, reader = world.key("read")
    with world.client() as client:
        assert client.post("/jobs", json=SMALLEST, headers=reader).status_code == 403
        assert client.post(f"/jobs/{NO_JOB}/cancel", headers=reader).status_code == 403
        assert client.delete(f"/jobs/{NO_JOB}", headers=reader).status_code == 403
        assert client.post("/nowhere", headers=reader).status_code == 403
        assert client.get("/audit", headers=reader).status_code == 403
        assert client.post("/jobs", json=SMALLEST, headers={"Authorization": "Bearer guess"}).status_code == 401
    actor = f"key:{key_id}"
    assert world.rows() == [
        (actor, "POST /jobs", "", 403),
        (actor, "POST /jobs/{id}/cancel", NO_JOB, 403),
        (actor, "DELETE /jobs/{id}", NO_JOB, 403),
        (actor, "POST unmatched", "", 403),
    ]


def test_refusal_over_the_rate_is_audited_once_a_second(tmp_path: Path) -> None:
    world = World(tmp_path, rate_limit_per_minute=2)
    key_id, submitter = world.key("submit")
    _, reader = world.key("read")
    began = time.monotonic()
    with world.client() as client:
        statuses = [client.post("/jobs", json=SMALLEST, headers=submitter).status_code for _ in range(20)]
        assert statuses == [201, 201, *[429] * 18]
        # What the scope forbids counts too.
        statuses = [client.post("/jobs", json=SMALLEST, headers=reader).status_code for _ in range(20)]
        assert statuses == [403, 403, *[429] * 18]
    mine = [status for actor, _, _, status in world.rows() if actor == f"key:{key_id}"]
    assert mine[:3] == [201, 201, 429]
    refused = [actor for actor, _, _, status in world.rows() if status == 429]
    # One of each at first, and one for each further second that all this took.
    assert 2 <= len(refused) <= 2 + 2 * (time.monotonic() - began)


def test_capabilities_have_the_bounds_that_are_answered_with_413_and_429(tmp_path: Path) -> None:
    bounds = {"rate_limit_per_minute": 7, "max_upload_bytes": 1000, "max_running_jobs": 3, "max_running_per_owner": 2}
    world = World(tmp_path, **bounds)
    with world.client() as client:
        limits = client.get("/capabilities").json()["limits"]
        assert limits["changes_per_minute"] is None, "who needs no key may ask as much as he likes"
        _, submitter = world.key("submit")
        time.sleep(NO_KEY_S + 0.1)
        limits = client.get("/capabilities", headers=submitter).json()["limits"]
        headers = submitter | {"Content-Type": "application/zip"}
        too_large = client.post("/datasets", params={"name": "x"}, content=b"x" * 1001, headers=headers)
        assert too_large.status_code == 413
    assert (limits["changes_per_minute"], limits["wrong_keys_per_minute"], limits["upload_bytes"]) == (7, 7, 1000)
    assert (limits["headers"], limits["header_bytes"], limits["upload_silence_seconds"]) == (100, 32_768, 60)
    assert (limits["uploads_at_once"], limits["streams"], limits["streams_per_owner"]) == (4, 1000, 100)
    assert (limits["running_jobs"], limits["running_jobs_per_owner"], limits["body_bytes"]) == (3, 2, 262_144)


def test_bucket_of_one_fills_by_the_second() -> None:
    at = [0.0]
    buckets = Buckets(60, at_once=1, clock=lambda: at[0])
    assert [buckets.has("a"), buckets.has("a"), buckets.has("b")] == [True, False, True]
    at[0] = 600.0
    assert [buckets.has("a"), buckets.has("a")] == [True, False]


def test_log_of_a_refusal_has_route_key_and_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, rate_limit_per_minute=1)
    key_id, reader = world.key("read")
    with caplog.at_level(logging.INFO, "ncfm.access"), world.client() as client:
        client.get(f"/jobs/{NO_JOB}")
        client.head("/jobs/validate", headers={"Authorization": "Bearer guess"})
        client.post("/jobs", json=SMALLEST, headers=reader)
        client.post(f"/jobs/{NO_JOB}/rerun", headers=reader)
        client.get("/wp-admin/" + "x" * 500)
        client.post("/jobs", json=SMALLEST, headers={"Origin": "http://evil.example"})
    lines = [vars(record) for record in caplog.records if record.name == "ncfm.access"]
    shown = [(line["method"], line["route"], line["status"], line["key"]) for line in lines]
    assert shown == [
        ("GET", "/jobs/{id}", 401, ""),
        ("HEAD", "/jobs/validate", 429, ""),
        ("POST", "/jobs", 403, key_id),
        ("POST", "/jobs/{id}/rerun", 429, key_id),
        ("GET", "unmatched", 429, ""),
        ("POST", "/jobs", 403, ""),
    ]
    assert {line["address"] for line in lines} == {"testclient"}
    assert [line["path"] for line in lines if "path" in line] == ["/wp-admin/" + "x" * 190]
