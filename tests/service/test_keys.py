"""Keys of the API: their life in the database, and what the real API makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select, text
from starlette.testclient import TestClient

from service.api import create_app
from service.api.auth import Buckets
from service.api.context import LOCAL, Caller, may_change
from service.api.errors import Forbidden, TooManyRequests
from service.cli import app as cli
from service.jobs import Job
from service.keys import CACHE_S, KEY_PATTERN, USED_PAUSE, KeyRing, Keys
from service.scopes import KeyProblem, Scope
from service.settings import Settings
from service.store import Store
from service.tables import api_keys, audit
from worker.records import now

SMALLEST = {"dataset": "digits", "ipc": 1}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(Settings(home=tmp_path).database)
    yield opened
    opened.close()


@pytest.fixture
def keys(store: Store) -> Keys:
    return Keys(store)


def make(keys: Keys, scope: Scope = "submit") -> tuple[str, str]:
    key, token = keys.create("test", scope, expires_at=None)
    return key.id, token


def test_secret_when_kept_is_a_digest_alone(keys: Keys, tmp_path: Path) -> None:
    _, token = make(keys)
    match = KEY_PATTERN.fullmatch(token)
    assert match is not None
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(match.group(2).encode() in content for content in files)


def test_key_is_found_by_its_whole_text_alone(keys: Keys) -> None:
    key_id, token = make(keys, "read")
    found = keys.find(token)
    assert found is not None and (found.id, found.scopes) == (key_id, frozenset({"read"}))
    other = token[:-1] + ("0" if token[-1] != "0" else "1")
    for wrong in ("", "ncfm_", token[:-1], token + "0", token.upper(), other, f"ncfm_{'0' * 12}_{token[-64:]}"):
        assert keys.find(wrong) is None


def test_key_when_expired_or_revoked_is_not_found(keys: Keys) -> None:
    _, past = keys.create("old", "admin", expires_at=now() - timedelta(seconds=1))
    assert keys.find(past) is None and not keys.any_valid()
    key_id, token = make(keys)
    assert keys.any_valid()
    keys.revoke(key_id)
    first = keys.revoke(key_id).revoked_at
    assert keys.find(token) is None and not keys.any_valid() and keys.exist()
    assert keys.revoke(key_id).revoked_at == first
    with pytest.raises(KeyProblem, match="revoked or expired"):
        keys.rotate(key_id, grace=timedelta(0))
    with pytest.raises(KeyProblem, match="no such key"):
        keys.revoke("nobody")


def test_key_when_rotated_keeps_its_id_and_for_a_while_its_old_secret(keys: Keys, store: Store) -> None:
    key_id, first = make(keys)
    _, second = keys.rotate(key_id, grace=timedelta(hours=1))
    assert [found.id for token in (first, second) if (found := keys.find(token))] == [key_id, key_id]
    with store.writing() as connection:
        connection.execute(api_keys.update().values(previous_until=now() - timedelta(seconds=1)))
    assert keys.find(first) is None and keys.find(second) is not None
    _, third = keys.rotate(key_id, grace=timedelta(0))
    assert keys.find(second) is None and keys.find(third) is not None


def test_use_of_a_key_is_noted_once_a_minute(keys: Keys, store: Store) -> None:
    _, token = make(keys)
    keys.find(token)
    [first] = keys.list()
    keys.find(token)
    assert first.used_at is not None and keys.list()[0].used_at == first.used_at
    with store.writing() as connection:
        connection.execute(api_keys.update().values(used_at=first.used_at - USED_PAUSE * 2))
    keys.find(token)
    used = keys.list()[0].used_at
    assert used is not None and used >= first.used_at


def test_name_of_a_key_is_refused_when_it_says_nothing(keys: Keys) -> None:
    for name in ("", "  ", "x" * 129, "a\nb"):
        with pytest.raises(KeyProblem, match="name"):
            keys.create(name, "read", expires_at=None)


def test_ring_asks_the_database_once_in_a_while(keys: Keys) -> None:
    time = [0.0]
    ring = KeyRing(keys, clock=lambda: time[0])
    key_id, token = make(keys)
    assert ring.known(token) is None and ring.find(token) is not None
    keys.revoke(key_id)
    assert ring.known(token) is not None
    time[0] = CACHE_S
    assert ring.known(token) is None and ring.find(token) is None
    assert ring.known_to_exist() is None and ring.exist() and ring.known_to_exist()


def test_changes_of_keys_are_audited(keys: Keys, store: Store) -> None:
    key_id, _ = make(keys)
    keys.rotate(key_id, grace=timedelta(hours=1))
    keys.revoke(key_id)
    with store.reading() as connection:
        rows = [(row.actor, row.action, row.target) for row in connection.execute(select(audit).order_by(audit.c.id))]
    assert rows == [("cli", f"keys.{verb}", key_id) for verb in ("create", "rotate", "revoke")]


def test_job_is_changed_by_its_owner_and_by_admins() -> None:
    job = Job(id="j", requested={}, spec={}, created_at=now(), owner="a")
    may_change(Caller("a", frozenset({"read", "submit"})), job)
    may_change(Caller("b", frozenset({"read", "submit", "admin"})), job)
    with pytest.raises(Forbidden, match="belongs to another key"):
        may_change(Caller("b", frozenset({"read", "submit"})), job)
    with pytest.raises(Forbidden, match="scope submit"):
        may_change(Caller("a", frozenset({"read"})), job)


def test_bucket_when_empty_says_when_to_come_again() -> None:
    time = [0.0]
    buckets = Buckets(60, clock=lambda: time[0])
    for _ in range(60):
        buckets.take("a", "a")
    with pytest.raises(TooManyRequests) as caught:
        buckets.take("a", "a")
    assert caught.value.headers["Retry-After"] == "1"
    buckets.take("b", "b")
    time[0] = 1.0
    buckets.take("a", "a")


# The real application from here on.


class World:
    """An API on a database of its own."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.app: FastAPI = create_app(Settings(home=home, **settings))
        self.keys = Keys(self.app.state.store)

    def client(self, token: str | None = None) -> TestClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return TestClient(self.app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.app.state.store.close()


def test_api_on_loopback_needs_a_key_as_soon_as_there_is_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keys.NO_KEY_S", 0.0)
    anybody = world.client()
    mine = anybody.post("/jobs", json=SMALLEST)
    assert mine.status_code == 201
    _, token = make(world.keys)
    for reply in (anybody.get("/jobs"), anybody.post("/jobs", json=SMALLEST), anybody.get("/nowhere")):
        assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
        assert reply.headers["WWW-Authenticate"] == 'Bearer realm="ncfm"'
        assert "ncfm keys create" in reply.json()["detail"]
    for path in ("/livez", "/readyz", "/openapi.json", "/docs"):
        assert anybody.get(path).status_code == 200, path
    known = world.client(token)
    made = known.post("/jobs", json=SMALLEST)
    assert made.status_code == 201
    stored = world.app.state.store.get(made.json()["id"])
    assert stored.owner == token.split("_")[1]
    assert known.get("/jobs").status_code == 200
    refused = known.post(f"/jobs/{mine.json()['id']}/cancel")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert known.post(f"/jobs/{made.json()['id']}/cancel").status_code == 202
    event = world.app.state.store.events(made.json()["id"], after=0, limit=9)[-1]
    assert event.actor == f"key:{stored.owner}"


def test_scope_when_missing_is_named(world: World) -> None:
    _, token = make(world.keys, "read")
    reader = world.client(token)
    assert reader.get("/jobs").status_code == 200
    for reply, scope in ((reader.post("/jobs", json=SMALLEST), "submit"), (reader.get("/audit"), "admin")):
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
        assert f"scope {scope}" in reply.json()["detail"]


def test_header_when_it_holds_no_good_key_is_401_and_not_echoed(world: World) -> None:
    _, token = make(world.keys)
    bad = token[:-1] + ("0" if token[-1] != "0" else "1")
    for header in (f"Bearer {bad}", f"Basic {bad}", "Bearer", "Bearer  ", bad, "Bearer é"):
        raw = header.encode("latin-1")
        reply = world.client().get("/jobs", headers=[(b"authorization", raw)])
        assert reply.status_code == 401, header
        assert reply.headers["WWW-Authenticate"].startswith('Bearer realm="ncfm", error="invalid_')
        assert bad[-64:] not in reply.text


def test_mode_off_needs_no_key_and_required_always(tmp_path: Path) -> None:
    for mode, status in (("off", 200), ("required", 401)):
        world = World(tmp_path, auth=mode)
        if mode == "off":
            make(world.keys)
        assert world.client().get("/jobs").status_code == status
        world.app.state.store.close()


def test_writes_when_too_many_are_429_and_reads_are_not(tmp_path: Path) -> None:
    world = World(tmp_path, rate_limit_per_minute=3)
    _, token = make(world.keys)
    _, other = make(world.keys)
    client = world.client(token)
    replies = [client.post("/jobs", json=SMALLEST) for _ in range(5)]
    assert [reply.status_code for reply in replies] == [201, 201, 201, 429, 429]
    assert replies[-1].json()["code"] == "too_many_requests" and int(replies[-1].headers["Retry-After"]) > 0
    assert client.get("/jobs").status_code == 200
    assert world.client(other).post("/jobs", json=SMALLEST).status_code == 201
    # Guesses at keys are counted by address.
    guesses = [world.client("guess").get("/jobs").status_code for _ in range(5)]
    assert guesses == [401, 401, 401, 429, 429]
    world.app.state.store.close()


def test_writes_where_no_key_is_needed_are_not_counted(tmp_path: Path) -> None:
    world = World(tmp_path, rate_limit_per_minute=1)
    assert [world.client().post("/jobs", json=SMALLEST).status_code for _ in range(4)] == [201] * 4
    world.app.state.store.close()


def test_headers_when_too_many_or_too_long_are_431(world: World) -> None:
    for headers in ({f"x-{i}": "1" for i in range(101)}, {"x": "1" * 40_000}):
        reply = world.client().get("/jobs", headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (431, "headers_too_large")


def test_audit_has_every_request_that_changes_something(tmp_path: Path) -> None:
    world = World(tmp_path)
    key_id, token = make(world.keys, "admin")
    with world.client(token) as client:
        made = client.post("/jobs", json=SMALLEST, headers={"X-Request-ID": "r1"}).json()["id"]
        client.get("/jobs")
        client.post(f"/jobs/{made}/cancel", headers={"X-Request-ID": "r2"})
        client.post("/jobs", json={"dataset": "no-such"}, headers={"X-Request-ID": "r3"})
        client.put("/jobs", headers={"X-Request-ID": "r4"})
    # The recorder writes its last batch when the application ends.
    world = World(tmp_path)
    client = world.client(token)
    first = client.get("/audit", params={"limit": 2}).json()
    assert first["next"] is not None
    rest = client.get("/audit", params={"before": first["next"]}).json()
    assert rest["next"] is None
    items = [*first["items"], *rest["items"]]
    assert [(item["request_id"], item["action"], item["target"]) for item in items] == [
        ("r4", "PUT /jobs", ""),
        ("r3", "POST /jobs", ""),
        ("r2", "POST /jobs/{id}/cancel", made),
        ("r1", "POST /jobs", made),
        ("", "keys.create", key_id),
    ]
    assert [item["data"].get("status") for item in items] == [405, 422, 202, 201, None]
    assert {item["actor"] for item in items[:4]} == {f"key:{key_id}"}
    assert client.get("/audit", params={"before": 0}).status_code == 422
    world.app.state.store.close()


def test_audit_when_the_database_is_away_is_kept_later(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.client() as client:
        with world.app.state.store.writing() as connection:
            connection.execute(text("ALTER TABLE audit RENAME TO hidden"))
        assert client.post("/jobs", json=SMALLEST).status_code == 201
        assert client.post("/jobs", json=SMALLEST).status_code == 201
        with world.app.state.store.writing() as connection:
            connection.execute(text("ALTER TABLE hidden RENAME TO audit"))
    with Store(Settings(home=tmp_path).database).reading() as connection:
        assert len(connection.execute(select(audit)).all()) == 2


def test_audit_takes_what_a_stranger_put_into_a_path(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.client() as client:
        client.post("/jobs/%00%0A/cancel")
    with Store(Settings(home=tmp_path).database).reading() as connection:
        assert connection.execute(select(audit.c.target)).scalar_one() == "??"


def test_open_path_is_open_for_looking_alone(world: World) -> None:
    make(world.keys)
    assert world.client().get("/livez").status_code == 200
    assert world.client().post("/livez").status_code == 401


def test_openapi_says_that_keys_are_bearer_tokens(world: World) -> None:
    document = world.client().get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert {"401", "403", "429"} <= set(document["paths"]["/jobs"]["post"]["responses"])


def ncfm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ncfm", *arguments])
    try:
        cli.main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    return 0


def test_keys_command_makes_shows_renews_and_ends_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("NCFM_HOME", str(tmp_path))
    monkeypatch.delenv("NCFM_DATABASE_URL", raising=False)

    def run(*arguments: str) -> dict[str, Any]:
        assert ncfm(monkeypatch, "keys", *arguments, "--json") == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    made = run("create", "--name", "me", "--scope", "admin", "--days", "2")
    assert KEY_PATTERN.fullmatch(made["key"]) and made["state"].startswith("valid until")
    renewed = run("rotate", made["id"], "--grace-hours", "1")
    assert renewed["id"] == made["id"] and renewed["key"] != made["key"]
    [listed] = run("list")["items"]
    assert listed["id"] == made["id"] and "key" not in listed
    assert run("revoke", made["id"])["state"] == "revoked"
    assert ncfm(monkeypatch, "keys", "create", "--name", "x", "--scope", "root") == cli.EXIT_BAD_INPUT
    assert "read, submit, admin" in capsys.readouterr().err
    assert ncfm(monkeypatch, "keys", "create", "--name", "plain") == 0
    said = capsys.readouterr()
    assert KEY_PATTERN.fullmatch(said.out.strip()) and said.out.strip() not in said.err
    assert ncfm(monkeypatch, "keys", "list") == 0
    assert "plain" in capsys.readouterr().out


def test_local_caller_has_the_owner_of_jobs_without_keys() -> None:
    assert Caller(LOCAL, frozenset()).actor.name == "local"
