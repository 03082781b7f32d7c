"""`ncfm demo`: one job from submission to figures, on a stack of its own where none runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from pydantic import JsonValue

from ncfm_core.errors import NcfmError
from ncfm_core.submission import resolve
from service.cli.jobs import AsJson, connect, follow
from service.cli.showing import accuracy_table
from service.cli.terminal import as_json, messages, results
from service.client import Client
from service.local.state import Home, StackError, StackStatus
from service.replies import Job
from service.settings import load_settings
from worker.spec_file import with_changes

SMALLEST: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1}
POLL_S = 0.2
STAGES = ("total", "teachers", "distill", "evaluate")


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the demo's service is."""

    api: str
    mlflow: str
    is_ours: bool


def demo(
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the job, as ipc=10.")
    ] = None,
    dest: Annotated[Path, typer.Option(help="Folder for the distilled set.")] = Path("ncfm-demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up until Ctrl-C, to look around.")] = False,
    json: AsJson = False,
) -> None:
    """See the whole service at work, in minutes.

    Distils the digits into ten images, trains networks on them, and compares with random images and with all of them.
    Uses the running stack of NCFM_HOME, or starts one in a temporary folder and stops it at the end.
    """
    document = with_changes(SMALLEST, settings or [])
    # Both before the minutes of work, not after.
    resolve(document)
    _check_writable(dest)
    try:
        with _ending_on_signals(), _stack() as stack, connect(stack.api) as client:
            _run(client, stack, document, dest=dest, keep=keep, json=json)
    finally:
        # Only where nothing came of it: a folder with anything in it stays.
        with suppress(OSError):
            dest.rmdir()


def _run(client: Client, stack: Stack, document: dict[str, JsonValue], *, dest: Path, keep: bool, json: bool) -> None:
    job = client.submit(document)
    messages.print(f"POST {stack.api}/jobs {document} -> job {job.id}", markup=False)
    for warning in job.warnings:
        messages.print(f"warning: {warning}", markup=False)
    job = _finish(client, job)
    if job.state != "succeeded":
        messages.print(f"the job {job.state}: {job.complaint}", style="red", markup=False)
        raise typer.Exit(1)
    _report(job, stack, client.pull(job.id, dest), keep=keep, json=json)
    if keep and stack.is_ours:
        messages.print(f"The stack stays up ({stack.api}, {stack.mlflow}) until Ctrl-C.")
        _wait_for_ctrl_c()


def _finish(client: Client, job: Job) -> Job:
    """Follow the job to its end; whoever gives up waiting does not want it either."""
    try:
        return follow(client, job)
    except (KeyboardInterrupt, SystemExit):
        with suppress(NcfmError):
            client.cancel(job.id)
        raise


def _report(job: Job, stack: Stack, files: list[Path], *, keep: bool, json: bool) -> None:
    preview = next((path for path in files if path.name == "preview.png"), None)
    images = next((path for path in files if path.name == "images.safetensors"), None)
    console = messages if json else results
    console.print(accuracy_table(job))
    lives = "" if keep or not stack.is_ours else " (closes with this demo; `ncfm demo --keep` leaves it up)"
    console.print(f"The set:     {images.parent if images else '-'}", markup=False)
    console.print(f"The picture: {preview or '-'}", markup=False)
    console.print(f"In MLflow:   {job.mlflow_url or stack.mlflow}{lives}", markup=False)
    if json:
        as_json(summary(job, preview=preview, set_path=images.parent if images else None))


def summary(job: Job, *, preview: Path | None, set_path: Path | None) -> dict[str, object]:
    """The demo's outcome for programs."""
    assert job.result is not None
    figures = {name: getattr(job.result, name) for name in ("distilled", "random_real", "full")}
    dataset = job.spec.get("dataset")
    return {
        "job_id": job.id,
        "dataset": dataset.get("name") if isinstance(dataset, dict) else dataset,
        "ipc": job.spec.get("ipc"),
        **{name: figure.model_dump() if figure else None for name, figure in figures.items()},
        "seconds": {name: job.result.seconds.get(name, 0.0) for name in STAGES},
        "mlflow_run_id": job.mlflow_run_id,
        "mlflow_url": job.mlflow_url,
        "preview": str(preview.absolute()) if preview else None,
        "set_path": str(set_path.absolute()) if set_path else None,
    }


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StackError.of(
            "--dest", str(folder), f"the folder cannot be written: {error.strerror}", "Name another with --dest."
        ) from error


@contextmanager
def _stack() -> Iterator[Stack]:
    """The stack that runs, or one for the time of the demo."""
    found = Home(load_settings().home).status()
    if found.state == "up":
        yield _as_stack(found, is_ours=False)
        return
    folder = Path(tempfile.mkdtemp(prefix="ncfm-demo-"))
    try:
        with _own_stack(folder) as stack:
            yield stack
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_stack(status: StackStatus, *, is_ours: bool) -> Stack:
    return Stack(api=status.api or "", mlflow=status.mlflow or "", is_ours=is_ours)


@contextmanager
def _own_stack(folder: Path) -> Iterator[Stack]:
    command = [sys.executable, "-m", "service.cli", "up", "--lifeline"]
    command += ["--port", "0", "--mlflow-port", "0", "--ray-port", "0"]
    # Everything below the folder: the demo leaves nothing in the storage or database of other jobs.
    own = {"NCFM_HOME": str(folder), "NCFM_STORAGE": "", "NCFM_DATABASE_URL": "", "NCFM_MLFLOW_PUBLIC_URL": ""}
    messages.print("starting the stack: MLflow, Ray, API, controller ...")
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            # The lifeline: it ends when this process does, however that happens.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,
        )
    try:
        started = time.monotonic()
        while (found := Home(folder).status()).state != "up":
            if process.poll() is not None:
                said = (folder / "up.log").read_text(encoding="utf-8", errors="replace").strip()
                raise StackError.of("", None, f"the stack did not start:\n{said}", "")
            time.sleep(POLL_S)
        messages.print(f"the stack is up after {time.monotonic() - started:.0f} s")
        yield _as_stack(found, is_ours=True)
    finally:
        messages.print("stopping the stack ...")
        process.terminate()
        process.communicate()


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: through every `finally`."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_ctrl_c() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
