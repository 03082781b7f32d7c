"""The client and the command line against the real API: made once, found again, followed to the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli import app as cli
from service.cli.terminal import results
from service.client import Client, ClientError, ServiceAway
from service.connection import NotNow
from service.jobs import Reason, State
from service.messages import Message, parse
from service.replies import Job
from service.reports import Progress
from service.store import Store
from tests.service.world import move
from worker.records import attempt_path
from worker.storage import Storage

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}
JOB = {"id": "01j", "state": "queued", "created_at": "2026-01-01T00:00:00Z"}


@pytest.fixture
def api(client: httpx.Client) -> Iterator[Client]:
    with Client(str(client.base_url)) as opened:
        yield opened


@pytest.fixture
def ncfm(
    api: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ncfm", *arguments, "--url", api.url])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capfd.readouterr()
        return left.value.code if isinstance(left.value.code, int) else 0, said.out, said.err

    return run


def later(seconds: float, work: Any) -> None:
    threading.Timer(seconds, work).start()


def answers(*given: httpx.Response | Exception) -> tuple[Client, list[httpx.Request]]:
    """A client whose service answers these, one after the other, and the requests that it got."""
    seen: list[httpx.Request] = []
    left = iter(given)

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Client("http://service", transport=httpx.MockTransport(handler)), seen


def test_submit_when_the_connection_is_lost_sends_it_again_under_the_same_key() -> None:
    client, seen = answers(
        httpx.ReadError("reset"), httpx.Response(503, json={"title": "away"}), httpx.Response(201, json=JOB)
    )
    assert client.submit(SMALLEST).id == "01j"
    keys = {request.headers["Idempotency-Key"] for request in seen}
    assert (len(seen), len(keys), len(next(iter(keys)))) == (3, 1, 32)
    client, seen = answers(*[httpx.Response(201, json=JOB)] * 2)
    client.submit(SMALLEST), client.submit(SMALLEST)
    assert seen[0].headers["Idempotency-Key"] != seen[1].headers["Idempotency-Key"]


def test_submit_when_refused_is_not_sent_again() -> None:
    client, seen = answers(httpx.Response(422, json={"title": "no"}))
    with pytest.raises(ClientError):
        client.rerun("01j", {"ipc": 0})
    assert len(seen) == 1


def test_submit_when_the_service_stays_away_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.RETRY_S", 0.3)
    client, _ = answers(*[httpx.ConnectError("refused")] * 10)
    with pytest.raises(ServiceAway, match="refused"):
        client.submit(SMALLEST)
    client, _ = answers(*[httpx.Response(503, json={"title": "busy"})] * 10)
    with pytest.raises(NotNow, match="busy"):
        client.submit(SMALLEST)


def test_messages_are_read_whatever_the_chunks(client: httpx.Client) -> None:
    stream = b": ping\n\nid: 3\nevent: state\ndata: {}\n\ndata: a\xe2\x80\xa8b\r\ndata:  c\n\nevent: end\ndata: cut"
    expected = [Message("state", "{}", "3"), Message("message", "a\u2028b\n c", "")]
    assert list(parse([stream])) == expected
    assert list(parse(bytes([byte]) for byte in stream)) == expected


def test_watch_when_the_stream_breaks_goes_on_where_it_was() -> None:
    running = JOB | {"state": "running"}
    first = b'id: 1\nevent: created\ndata: {}\n\nevent: progress\ndata: {"completed": 5, "total": 10}\n\n'
    client, seen = answers(
        httpx.Response(200, json=JOB),
        httpx.Response(200, content=first),
        httpx.Response(200, json=running),
        httpx.ConnectError("restarting"),
        httpx.Response(200, content=b'id: 2\nevent: state\ndata: {}\n\nevent: end\ndata: {"state": "failed"}\n\n'),
        httpx.Response(200, json=running | {"state": "failed"}),
    )
    looks = list(client.watch("01j"))
    assert [job.state for job in looks] == ["queued", "running", "running", "failed"]
    assert looks[2].progress is not None and looks[2].progress.completed == 5
    assert seen[4].headers["Last-Event-ID"] == "1"
    assert seen[1].headers["Accept"] == "text/event-stream"


def test_watch_follows_a_real_job_to_its_end(api: Client, api_store: Store) -> None:
    job_id = api.submit(SMALLEST).id
    progress = Progress(stage="distill", completed=5, total=10, unit="step")
    looks: list[Job] = []
    for look in api.watch(job_id):
        if not looks:
            move(api_store, job_id, State.STARTING, State.RUNNING, progress=progress)
        elif look.state == "running" and not any(each.state == "running" for each in looks):
            move(api_store, job_id, State.FAILED)
        looks.append(look)
    assert (looks[0].state, looks[-1].state) == ("queued", "failed")
    assert any(job.progress and job.progress.percent == 50 for job in looks)


def test_follow_log_goes_from_attempt_to_attempt(api: Client, api_store: Store, api_storage: Storage) -> None:
    job_id = api.submit(SMALLEST).id
    later(0.3, lambda: move(api_store, job_id, State.STARTING, State.RUNNING))
    later(0.4, lambda: api_storage.put(attempt_path(job_id, 1, "driver.log"), b"one\nbroken"))
    later(0.9, lambda: move(api_store, job_id, State.RECOVERING, reason=Reason.WORKER_LOST))
    later(1.0, lambda: api_storage.put(attempt_path(job_id, 2, "driver.log"), b"two\n"))
    later(1.2, lambda: move(api_store, job_id, State.STARTING, attempt=2))
    later(1.8, lambda: move(api_store, job_id, State.FAILED, attempt=2))
    assert list(api.follow_log(job_id)) == ["one\n", "broken\n", "two\n"]


def test_client_changes_filters_and_deletes(api: Client) -> None:
    made = api.submit(SMALLEST | {"labels": {"batch": "x1"}})
    again = api.rerun(made.id, {"seed": 9}, priority=80)
    assert (again.parent_id, again.priority, again.labels) == (made.id, 80, {"batch": "x1"})
    found, _ = api.jobs(filters={"label": "batch:x1", "state": ["queued", "running"]})
    assert [(job.id, job.title) for job in found] == [(again.id, "digits ipc 1"), (made.id, "digits ipc 1")]
    assert api.change(made.id, labels={"batch": None}, priority=3).labels == {}
    assert api.cancel(made.id, mode="force").state == "cancelled"
    api.delete(made.id)
    with pytest.raises(ClientError, match="no such job"):
        api.job(made.id)
    assert api.attempts(again.id) == []
    assert api.validate(SMALLEST).stages[0].stage == "inspect"


def test_commands_hand_in_list_rerun_and_remove(ncfm: Callable[..., tuple[int, str, str]]) -> None:
    arguments = (
        "--dataset",
        "digits",
        "--ipc",
        "1",
        "--priority",
        "70",
        "--label",
        "set=cli",
        "--key",
        "cli-1",
        "--json",
    )
    made = json.loads(ncfm("submit", *arguments)[1])
    assert json.loads(ncfm("submit", *arguments)[1])["id"] == made["id"]
    assert (made["priority"], made["labels"]) == (70, {"set": "cli"})
    again = json.loads(ncfm("rerun", made["id"], "--set", "seed=5", "--json")[1])
    assert (again["parent_id"], again["spec"]["seed"]) == (made["id"], 5)
    listed = json.loads(ncfm("ls", "--label", "set=cli", "--state", "queued", "--oldest", "--json")[1])
    assert [item["id"] for item in listed["items"]] == [made["id"], again["id"]]
    code, out, _ = ncfm("ls", "--label", "set=cli")
    assert code == 0 and made["id"] in out
    code, _, said = ncfm("rm", made["id"])
    assert code == cli.EXIT_BAD_INPUT and f"`ncfm cancel {made['id']}` ends it first" in said
    ncfm("cancel", made["id"], "--force")
    assert ncfm("rm", made["id"])[0] == 0
    code, _, said = ncfm("show", made["id"])
    assert code == cli.EXIT_BAD_INPUT and "`ncfm ls` lists all" in said
    assert "--label key=value" in ncfm("ls", "--label", "NO WAY=x")[2]


def test_command_validate_shows_stages_and_estimate(ncfm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ncfm("validate", "--dataset", "digits", "--ipc", "1")
    assert code == 0
    assert "distill" in out and "unknown until inspected" in out and "estimate: none (no cluster" in out
    assert json.loads(ncfm("validate", "--dataset", "digits", "--ipc", "1", "--json")[1])["digest"]


def test_commands_follow_log_and_job(
    ncfm: Callable[..., tuple[int, str, str]], api: Client, api_store: Store, api_storage: Storage
) -> None:
    job_id = api.submit(SMALLEST).id
    move(api_store, job_id, State.STARTING)
    api_storage.put(attempt_path(job_id, 1, "driver.log"), b"[bold]hello\n")
    later(0.6, lambda: move(api_store, job_id, State.FAILED))
    assert ncfm("logs", "-f", job_id)[:2] == (0, "[bold]hello\n")
    assert ncfm("logs", "--attempt", "1", job_id)[:2] == (0, "[bold]hello\n")
    assert ncfm("logs", "--attempt", "2", job_id)[0] == cli.EXIT_BAD_INPUT
    assert ncfm("watch", job_id)[0] == 1


def test_command_when_interrupted_detaches_and_says_how_to_cancel(api: Client) -> None:
    job_id = api.submit(SMALLEST).id
    command = [sys.executable, "-m", "service.cli", "watch", job_id, "--url", api.url]

    def as_from_a_terminal() -> None:
        # Whoever starts the tests in the background may have had them ignore it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=as_from_a_terminal) as process:
        assert process.stderr is not None
        while "queued" not in process.stderr.readline():
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert f"ncfm cancel {job_id}" in said and "Traceback" not in said
    assert api.job(job_id).state == "queued"


def test_command_edit_changes_priority_and_labels(ncfm: Callable[..., tuple[int, str, str]], api: Client) -> None:
    job_id = api.submit(SMALLEST | {"labels": {"old": "1", "kept": "2"}}).id
    code, out, _ = ncfm("edit", job_id, "--priority", "60", "--label", "old=", "--label", "new=a=b")
    assert code == 0 and "priority 60" in out and "kept=2, new=a=b" in out
    changed = api.job(job_id)
    assert (changed.priority, changed.labels) == (60, {"kept": "2", "new": "a=b"})
    code, _, said = ncfm("edit", job_id, "--priority", "101")
    assert code == cli.EXIT_BAD_INPUT and "priority" in said


def test_commands_take_a_preset(ncfm: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ("--dataset", "cifar10", "--ipc", "1", "--preset", "quick", "--json")
    assert json.loads(ncfm("submit", *arguments)[1])["spec"]["preset"] == "quick"
    assert json.loads(ncfm("validate", *arguments)[1])["spec"]["preset"] == "quick"
    code, _, said = ncfm("validate", "--dataset", "cifar10", "--ipc", "1", "--preset", "quik")
    assert code == cli.EXIT_BAD_INPUT and "quick" in said


def test_command_submit_says_what_is_waited_for(ncfm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ncfm("submit", "--dataset", "digits", "--ipc", "1")
    assert code == 0 and "waits for a controller" in out and "start one with `ncfm controller`" in out


def test_command_show_says_how_a_job_ended(ncfm: Callable[..., tuple[int, str, str]], api_store: Store) -> None:
    job_id = json.loads(ncfm("submit", "--dataset", "digits", "--ipc", "1", "--json")[1])["id"]
    ended = "cancelled by request; nothing of it is left running; a rerun goes on from its checkpoints"
    move(api_store, job_id, State.CANCELLED, message=ended)
    assert ended in ncfm("show", job_id)[1]


@pytest.mark.parametrize("command", ["show", "watch"])
def test_command_when_an_address_is_longer_than_the_terminal_keeps_it_whole(
    ncfm: Callable[..., tuple[int, str, str]],
    api: Client,
    api_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(results, "_width", 80)
    address = f"http://127.0.0.1:5000/#/experiments/1/runs/{'0123456789abcdef' * 8}"
    job_id = api.submit(SMALLEST).id
    move(api_store, job_id, State.STARTING, State.FAILED, mlflow_url=address)
    assert address in ncfm(command, job_id)[1]


@pytest.mark.parametrize(
    ("states", "way_out"),
    [((State.STARTING, State.RUNNING), "ncfm watch {id}"), ((State.STARTING, State.FAILED), "ncfm show {id}")],
)
def test_command_pull_when_there_is_no_set_says_the_state_and_the_way_out(
    ncfm: Callable[..., tuple[int, str, str]],
    api: Client,
    api_store: Store,
    tmp_path: Path,
    states: tuple[State, ...],
    way_out: str,
) -> None:
    job_id = api.submit(SMALLEST).id
    move(api_store, job_id, *states)
    code, out, said = ncfm("pull", job_id, str(tmp_path / "set"))
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert states[-1] in said and way_out.format(id=job_id) in said
    assert not (tmp_path / "set").exists()
