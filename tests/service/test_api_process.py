from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.api import create_app, listing
from service.api.server import AddressError, bind, check_reach
from service.database import StoreError
from service.keys import Keys
from service.settings import Settings
from service.store import Store

SMALLEST = {"dataset": "digits", "ipc": 1}

LIGHT = """
import sys, time
began = time.perf_counter()
import service.api, service.controller
from service.settings import Settings
service.api.create_app(Settings(home=sys.argv[1]))
heavy = {"torch", "torchvision", "ray", "mlflow", "sklearn", "pandas", "numpy"} & set(sys.modules)
assert not heavy, heavy
sys.stdout.write(str(time.perf_counter() - began))
"""

SERVE = """
import sys
from service.settings import Settings
import service.api, service.controller
getattr(service, sys.argv[2]).main(Settings(home=sys.argv[1], port=0, ray_url="http://127.0.0.1:9"))
"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    built = create_app(Settings(home=tmp_path))
    yield built
    built.state.store.close()


def caller(app: FastAPI, host: str = "127.0.0.1") -> TestClient:
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


def test_api_and_controller_when_imported_load_nothing_heavy_and_start_fast(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 10, "about one second, with room for a busy machine"


@pytest.mark.parametrize("process", ["api", "controller"])
def test_process_when_told_to_end_ends_cleanly(tmp_path: Path, process: str) -> None:
    ready = {"api": "api listens on", "controller": "controller follows"}[process]
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path), process], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        watchdog = threading.Timer(30, running.kill)
        watchdog.start()
        said = ""
        while ready not in said and (line := running.stderr.readline()):
            said += line
        running.terminate()
        said += running.stderr.read()
        watchdog.cancel()
    assert ready in said
    assert running.returncode == 0, said
    assert "Traceback" not in said


def test_bind_when_others_could_reach_it_needs_a_key(tmp_path: Path) -> None:
    store = Store(Settings(home=tmp_path).database)
    keys = Keys(store)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.com"):
        with pytest.raises(AddressError, match="ncfm keys create") as caught:
            check_reach(Settings(home=tmp_path, host=host), keys)
        assert caught.value.problems[0].field == "NCFM_HOST"
    check_reach(Settings(home=tmp_path, host="localhost"), keys)
    key, _ = keys.create("me", "admin", expires_at=None)
    check_reach(Settings(home=tmp_path, host="0.0.0.0"), keys)
    with pytest.raises(AddressError, match="NCFM_AUTH is off"):
        check_reach(Settings(home=tmp_path, host="0.0.0.0", auth="off"), keys)
    keys.revoke(key.id)
    with pytest.raises(AddressError, match="there is no key"):
        check_reach(Settings(home=tmp_path, host="0.0.0.0"), keys)
    store.close()


def test_bind_when_localhost_is_named_is_on_loopback(tmp_path: Path) -> None:
    with bind(Settings(home=tmp_path, host="localhost", port=0)) as listener:
        assert listener.getsockname()[1] > 0


def test_bind_when_a_client_calls_answers_without_waiting_for_acknowledgements(tmp_path: Path) -> None:
    with bind(Settings(home=tmp_path, port=0)) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_bind_when_the_port_is_taken_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressError) as caught:
        bind(Settings(home=tmp_path, port=taken.getsockname()[1]))
    [problem] = caught.value.problems
    assert problem.field == "NCFM_PORT"
    assert "in use" in problem.message


def test_host_when_it_is_public_may_be_called_with_a_key(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, host="0.0.0.0", public_hosts=("api.cluster.local",)))
    _, token = Keys(app.state.store).create("me", "submit", expires_at=None)
    client = caller(app, "api.cluster.local")
    client.headers["Authorization"] = f"Bearer {token}"
    assert client.get("/livez").status_code == 200
    assert client.get("/livez", headers={"Host": "other.cluster.local"}).status_code == 403
    origin = {"Origin": "http://evil.example"}
    assert client.post("/jobs", json=SMALLEST, headers=origin).status_code == 403
    assert client.post("/jobs", json=SMALLEST, headers={"Origin": "http://api.cluster.local"}).status_code == 201
    app.state.store.close()


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "127.1.2.3:80"])
def test_host_when_it_is_this_machine_is_ours(app: FastAPI, host: str) -> None:
    assert caller(app).get("/livez", headers={"Host": host}).status_code == 200


def test_readyz_when_the_database_is_away_is_503_and_livez_is_not(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = caller(app)

    def away(*_: object, **__: object) -> None:
        raise StoreError.of("NCFM_DATABASE_URL", "sqlite:///x", "the database cannot be used: disk I/O error")

    for name in ("check_writable", "add_once"):
        monkeypatch.setattr(Store, name, away)
    monkeypatch.setattr(listing, "summaries", away)
    assert client.get("/livez").status_code == 200
    for reply in (client.get("/readyz"), client.get("/jobs"), client.post("/jobs", json=SMALLEST)):
        assert reply.status_code == 503
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert reply.headers["Retry-After"] == "2"
        assert reply.json()["code"] == "database_unavailable"


def test_bug_when_it_strikes_is_a_problem_without_a_traceback(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(listing, "summaries", broken)
    reply = caller(app).get("/jobs", headers={"X-Request-ID": "find-me"})
    assert (reply.status_code, reply.json()["code"], reply.json()["request_id"]) == (500, "internal", "find-me")
    assert reply.headers["X-Request-ID"] == "find-me"
    assert "secret" not in reply.text
    assert "Zero" not in reply.text


def test_api_when_restarted_has_every_job_that_it_acknowledged(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    first = create_app(settings)
    made = caller(first).post("/jobs", json=SMALLEST).json()
    first.state.store.close()
    second = create_app(settings)
    assert caller(second).get(f"/jobs/{made['id']}").json() == made
    second.state.store.close()


def test_root_when_opened_leads_to_the_documentation(app: FastAPI) -> None:
    reply = caller(app).get("/", follow_redirects=False)
    assert (reply.status_code, reply.headers["Location"]) == (307, "/docs")
