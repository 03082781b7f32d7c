"""How the API is operated: its log, its figures, its page, and its end. Its process is a real one where that matters."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ncfm_core.errors import Problem
from service import logs
from service.jobs import Job, Reason, State, new_job_id
from service.keys import Keys
from service.settings import Settings
from service.sightings import Sighting
from service.store import Store
from worker.records import ErrorRecord, FileRecord, now
from worker.redaction import MASK, redact
from worker.storage import Storage

SMALLEST = {"dataset": "digits", "ipc": 1}
TOKEN = f"ncfm_{'0' * 12}_{'a' * 64}"

SERVE = """
import sys
from service.settings import Settings
import service.api
service.api.main(Settings(home=sys.argv[1], port=0))
"""


@dataclass(frozen=True)
class Running:
    """A process of the API."""

    process: subprocess.Popen[str]
    port: int
    lines: list[dict[str, Any]]
    """What it has logged."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running(home: Path) -> Iterator[Running]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NCFM_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(home)], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    stderr = process.stderr

    def read() -> None:
        lines.extend(json.loads(line) for line in stderr)

    try:
        first = json.loads(stderr.readline())
        reader = threading.Thread(target=read)
        reader.start()
        yield Running(process, int(first["message"].rpartition(" ")[2]), lines)
    finally:
        process.kill()
        process.wait()
        reader.join()
        stderr.close()


SECRETS = [
    ("s3://AKIAABCDEFGHIJKLMNOP:wJalrXUtnFEMI@bucket/x", "wJalrXUtnFEMI"),
    ("postgresql://ncfm:hunter2@db:5432/ncfm", "hunter2"),
    ("https://host/x?access_token=hunter2&y=1", "hunter2"),
    ("https://b.s3/x?X-Amz-Signature=deadbeef&X-Amz-Credential=hunter2", "deadbeef"),
    ("Authorization: Bearer hunter2hunter2", "hunter2hunter2"),
    (f"key {TOKEN} is bad", "a" * 64),
    (TOKEN[:60] + "...", "a" * 30),
    ("aws_secret_access_key = wJalrXUtnFEMIK7MDENG/bPxRfiCYEXAMPLE", "wJalrXUtn"),
    ('{"password": "hunter2hunter2hunter2"}', "hunter2"),
    ("AKIAABCDEFGHIJKLMNOP", "AKIA"),
    ("s3://someone:hunter2hunter2hunter2...", "hunter2"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
]
HARMLESS = [
    "job 01kexample is starting (attempt 1)",
    "a key stands twice in one object",
    "code idempotency_key_reused: was used for another request",
    "/data/birds.tar",
    "http://127.0.0.1:8000/jobs?cursor=abc&limit=5",
    "mail me@example.org",
    "token: 12",
    "sha256:" + "a" * 64,
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secret_in_a_text_is_masked(text: str, secret: str) -> None:
    assert secret not in redact(text) and MASK in redact(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_redaction_of_hostile_text_takes_no_time() -> None:
    patterns = ("http://", "a", "key_", "?token", "-----BEGIN PRIVATE KEY-----", "x-amz-", "bearer ", "a.b", "token:")
    began = time.process_time()
    for pattern in patterns:
        redact(pattern * (100_000 // len(pattern)))
    assert time.process_time() - began < 3


def test_error_when_recorded_holds_no_secret() -> None:
    problem = Problem("dataset.uri", "s3://me:hunter2@bucket", "cannot read s3://me:hunter2@bucket")
    assert "hunter2" not in ErrorRecord(code="x", problems=(problem.as_dict(),)).model_dump_json()


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_log_line_is_one_line_without_secrets(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("ncfm", logging.INFO, "", 0, "read %s\nforged", ("s3://me:hunter2@bucket",), None)
    record.__dict__.update(action="read", job="j", request_id="r")
    line = formatter.format(record)
    assert "hunter2" not in line and "\n" not in line
    if isinstance(formatter, logs.JsonFormatter):
        document = json.loads(line)
        assert document["time"].endswith("Z")
        assert (document["level"], document["action"], document["job"], document["request_id"]) == (
            "info",
            "read",
            "j",
            "r",
        )


def test_log_of_the_api_has_one_json_line_for_each_request(tmp_path: Path) -> None:
    with running(tmp_path) as api:
        with httpx.Client(base_url=api.url, trust_env=False) as client:
            made = client.post("/jobs", json=SMALLEST, headers={"X-Request-ID": "r1"}).json()["id"]
            client.get(f"/jobs/{made}", headers={"X-Request-ID": "r2"})
            client.get(f"/nowhere/{TOKEN}", headers={"X-Request-ID": "r3"})
            client.head("/jobs", headers={"X-Request-ID": "r4"})
        api.process.terminate()
        assert api.process.wait(10) == 0
    access = {line["request_id"]: line for line in api.lines if line.get("action") == "request"}
    seen = {name: (line["method"], line["route"], line["status"]) for name, line in access.items()}
    assert seen == {
        "r1": ("POST", "/jobs", 201),
        "r2": ("GET", "/jobs/{id}", 200),
        "r3": ("GET", "unmatched", 404),
        "r4": ("HEAD", "/jobs", 200),
    }
    assert all(line["ms"] >= 0 and line["key"] == "local" for line in access.values())
    assert TOKEN not in json.dumps(api.lines)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_of_jobs_requests_cluster_and_loop(
    client: httpx.Client, api_store: Store, api_settings: Settings
) -> None:
    # A job that was lost once, and one that waits for MLflow.
    for reason in (Reason.WORKER_LOST, None):
        job = api_store.add(Job(id=new_job_id(), requested={}, spec={"dataset": "digits"}, created_at=now()))
        for to in (State.STARTING, State.RUNNING, State.RECOVERING if reason else State.SUCCEEDED):
            moved = api_store.move(job, to, reason=reason, attempt=1, publication="none" if reason else "pending")
            assert moved is not None
            job = moved
    waiting = client.post("/jobs", json=SMALLEST).json()["id"]
    api_store.see(Sighting(cpus=8.0, gpus=2.0, seen_at=now(), checked_at=now(), mlflow_error="away"))
    client.request("BREW", "/jobs")
    client.get("/no/such/path")
    reply = client.get("/metrics")
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/plain")
    found = samples(reply.text)
    assert found["ncfm_jobs", "state=queued"] >= 1 and found["ncfm_jobs", "state=recovering"] == 1
    assert ("ncfm_jobs", "state=failed") in found, "a state without jobs is 0, not absent"
    assert found["ncfm_attempts_lost_total", "reason=worker_lost"] == 1
    assert found[("ncfm_publications_pending",)] == 1
    assert found[("ncfm_queue_oldest_seconds",)] >= 0
    assert (found[("ncfm_cluster_cpus",)], found[("ncfm_cluster_gpus",)]) == (8.0, 2.0)
    assert (found["ncfm_up", "part=ray"], found["ncfm_up", "part=mlflow"]) == (1.0, 0.0)
    assert found["ncfm_http_requests_total", "method=POST", "route=/jobs", "status=201"] == 1
    assert found["ncfm_http_requests_total", "method=other", "route=/jobs", "status=405"] == 1
    assert found["ncfm_http_requests_total", "method=GET", "route=unmatched", "status=404"] == 1
    assert found["ncfm_http_request_seconds_count", "route=/jobs"] == 2
    assert ("ncfm_event_loop_lag_seconds_count",) in found
    assert any(name[0] == "ncfm_build_info" for name in found)
    assert waiting not in reply.text, "an id is never a label"


def test_page_about_the_api_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    reply = client.get("/docs")
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/html")
    assert "<code>/jobs/{id}/cancel</code>" in reply.text and 'href="/openapi.json"' in reply.text
    assert "<script" not in reply.text and not re.findall(r"(?:src|href)=\"(?!/openapi\.json)", reply.text)
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    style = re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()}'" in policy
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in reply.text


def big_artifact(home: Path) -> str:
    """A job with a file that no socket's buffers hold."""
    storage, store = Storage(Settings(home=home).storage_url), Store(Settings(home=home).database)
    data = bytes(48 << 20)
    storage.put("objects/x/big", data)
    file = FileRecord(name="big", path="objects/x/big", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    job = store.add(Job(id=new_job_id(), requested={}, spec={}, created_at=now(), artifacts=(file,)))
    store.close()
    return job.id


def test_api_when_told_to_end_refuses_what_is_new_and_is_gone_soon(tmp_path: Path) -> None:
    job_id = big_artifact(tmp_path)
    with running(tmp_path) as api:
        downloads = []
        for _ in range(3):
            download = socket.create_connection(("127.0.0.1", api.port))
            download.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            download.sendall(f"GET /jobs/{job_id}/artifacts/big HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert download.recv(12) == b"HTTP/1.1 200"
            downloads.append(download)
        half = socket.create_connection(("127.0.0.1", api.port))
        half.sendall(
            b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        kept = http.client.HTTPConnection("127.0.0.1", api.port)
        kept.request("GET", "/livez")
        assert kept.getresponse().read()
        began = time.monotonic()
        api.process.send_signal(signal.SIGTERM)
        status, retry_after = 201, None
        while status == 201 and time.monotonic() < began + 8:
            kept.request("POST", "/jobs", json.dumps(SMALLEST), {"Content-Type": "application/json"})
            reply = kept.getresponse()
            status, retry_after = reply.status, reply.headers["Retry-After"]
            document = json.loads(reply.read())
        assert (status, retry_after, document["code"]) == (503, "5", "draining")
        kept.request("GET", "/readyz")
        ready = kept.getresponse()
        assert ready.status == 503 and ready.headers["Retry-After"] and ready.read()
        assert api.process.wait(40) == 0
        assert time.monotonic() - began <= 30, (
            "10 s are allowed to what is open; a busy machine takes longer to end a process"
        )
        for opened in (*downloads, half):
            opened.close()
        kept.close()
    assert not [line for line in api.lines if "Traceback" in str(line)]
    store = Store(Settings(home=tmp_path).database)
    untouched = store.get(job_id)
    assert untouched is not None and untouched.version == 1
    store.close()


def test_keys_when_required_guard_the_metrics(tmp_path: Path) -> None:
    with running(tmp_path) as api, httpx.Client(base_url=api.url, trust_env=False) as client:
        assert client.get("/metrics").status_code == 200
        store = Store(Settings(home=tmp_path).database)
        _, token = Keys(store).create("scraper", "read", expires_at=None)
        store.close()
        time.sleep(1.1)
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 200
