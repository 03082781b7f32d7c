"""A typed client of the HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

import httpx
from pydantic import JsonValue

from service.connection import CONNECT_TIMEOUT_S, POLL_S, ClientError, Connection, ServiceAway
from service.replies import (
    Artifact,
    ArtifactPage,
    Attempt,
    AttemptPage,
    Event,
    EventPage,
    Forecast,
    Job,
    JobPage,
    JobSummary,
    Progress,
    Upload,
    UploadPage,
)

__all__ = ["Client", "ClientError", "ServiceAway"]

UPLOAD_TIMEOUT_S = 3600.0
"""The service looks into an archive before it answers."""
PATIENCE_S = 60.0
"""Longer than a supervisor takes to start the API again."""
RETRY_S = 5.0
"""How long a request that makes a job is sent again, under its key, when the connection is lost or the service is not ready."""
JSON = {"Content-Type": "application/json"}


class Client(Connection):
    """The API at one address.

    Raises:
        ServiceAway: by every method, when nothing answers.
        ClientError: by every method, when the service refuses; it names field, value and way out.
    """

    def submit(self, document: Mapping[str, JsonValue], *, key: str | None = None) -> Job:
        """Hand in a submission, such as `{"dataset": "digits", "ipc": 1}`; it makes one job, however often it has to be sent.

        Args:
            document: the spec, and beside it `priority` and `labels`.
            key: Idempotency-Key; a new one by default.
        """
        return self._make("/jobs", document, key)

    def rerun(
        self,
        job_id: str,
        overrides: Mapping[str, JsonValue] | None = None,
        *,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Job:
        """A new job from what another one was asked for.

        Args:
            job_id: of the other one.
            overrides: merge patch of its submission.
            priority: of the new job; the other one's by default.
            labels: of the new job; the other one's by default.
            key: Idempotency-Key; a new one by default.
        """
        given = {"overrides": overrides, "priority": priority, "labels": labels}
        wishes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return self._make(_path(job_id, "rerun"), wishes, key)

    def validate(self, document: Mapping[str, JsonValue]) -> Forecast:
        """What would become of a submission; nothing is kept."""
        return self._get(Forecast, "POST", "/jobs/validate", content=_encode(document), headers=JSON)

    def jobs(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        filters: Mapping[str, str | Sequence[str]] | None = None,
    ) -> tuple[list[JobSummary], str | None]:
        """A page of jobs, and where the next one starts.

        Args:
            limit: most jobs of the page.
            cursor: where the page starts: belongs to the filters of the page before.
            filters: `state`, `dataset`, `method`, `owner`, `label` (`key:value`), `created_after`, `created_before`, `order`.
        """
        params: dict[str, Any] = {"limit": str(limit)} | dict(filters or {}) | ({"cursor": cursor} if cursor else {})
        page = self._get(JobPage, "GET", "/jobs", params=params)
        return list(page.items), page.next

    def change(
        self, job_id: str, *, priority: int | None = None, labels: Mapping[str, str | None] | None = None
    ) -> Job:
        """Change the priority of a queued job, or labels, of which None takes one away."""
        given = {"priority": priority, "labels": labels}
        wishes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return self._get(Job, "PATCH", _path(job_id), content=_encode(wishes), headers=JSON)

    def delete(self, job_id: str) -> None:
        """Take a job that has ended out of the lists."""
        self._ask("DELETE", _path(job_id))

    def attempts(self, job_id: str) -> list[Attempt]:
        return list(self._get(AttemptPage, "GET", _path(job_id, "attempts")).items)

    def job(self, job_id: str) -> Job:
        return self._get(Job, "GET", _path(job_id))

    def events(self, job_id: str) -> Iterator[Event]:
        """Everything that has happened to a job, in order."""
        after: int | None = 0
        while after is not None:
            page = self._get(EventPage, "GET", _path(job_id, "events"), params={"after": str(after)})
            yield from page.items
            after = page.next

    def cancel(
        self,
        job_id: str,
        *,
        mode: Literal["graceful", "force"] = "graceful",
        checkpoint: bool = False,
        grace_seconds: float | None = None,
    ) -> Job:
        """Ask for the end of a job; a second request may only make a graceful end a forced one."""
        wish: dict[str, JsonValue] = {"mode": mode, "checkpoint": checkpoint}
        wish |= {} if grace_seconds is None else {"grace_seconds": grace_seconds}
        return self._get(Job, "POST", _path(job_id, "cancel"), content=_encode(wish), headers=JSON)

    def logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None) -> str:
        """What a driver has printed.

        Args:
            job_id: of the job.
            attempt: whose driver; the last one's by default.
            tail: so many of its last lines; all by default.
        """
        given = {"attempt": attempt, "tail": tail}
        params = {name: str(value) for name, value in given.items() if value is not None}
        return self._ask("GET", _path(job_id, "logs"), params=params, headers={"Accept": "text/plain"}).text

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The files of the distilled set; none before the job has succeeded."""
        return list(self._get(ArtifactPage, "GET", _path(job_id, "artifacts")).items)

    def download(self, job_id: str, name: str, to: Path) -> Path:
        """Fetch one artifact into a file; it appears whole or not at all."""
        return self._fetch(_path(job_id, "artifacts", *PurePosixPath(name).parts), to)

    def zip(self, job_id: str, to: Path) -> Path:
        """Fetch all artifacts as one zip."""
        return self._fetch(_path(job_id, "artifacts.zip"), to)

    def pull(self, job_id: str, folder: Path) -> list[Path]:
        """Fetch all artifacts into a folder, each checked against its sum."""
        fetched = []
        for artifact in self.artifacts(job_id):
            to = folder / artifact.name
            if not to.resolve().is_relative_to(folder.resolve()):
                raise self._stranger(f"an artifact is to be written outside the folder: {artifact.name}")
            self.download(job_id, artifact.name, to)
            with to.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != artifact.sha256:
                    raise ClientError.of("path", artifact.name, "arrived damaged", "Fetch it again.")
            fetched.append(to)
        return fetched

    def upload(self, archive: Path, name: str) -> Upload:
        """Send a .tar, .tar.gz or .zip of images; the same bytes sent again are the same upload.

        Raises:
            ClientError: the file cannot be read or is no archive by its name, or the service refuses it.
        """
        endings = {".tar": "application/x-tar", ".gz": "application/gzip", ".tgz": "application/gzip"}
        media_type = (endings | {".zip": "application/zip"}).get(archive.suffix.lower())
        if media_type is None:
            raise ClientError.of("file", str(archive), "not an archive by its name", "Send a .tar, .tar.gz or .zip.")
        try:
            with archive.open("rb") as file:
                digest = base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()
                headers = {
                    "Content-Type": media_type,
                    "Content-Length": str(file.seek(0, 2)),
                    "Repr-Digest": f"sha-256=:{digest}:",
                }
                file.seek(0)
                timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
                options = {"params": {"name": name}, "content": file, "headers": headers, "timeout": timeout}
                return self._get(Upload, "POST", "/datasets", **options)
        except OSError as error:
            raise ClientError.of("file", str(archive), f"cannot be read: {error.strerror}", "Name another.") from error

    def uploads(self, *, limit: int = 50, cursor: str | None = None) -> tuple[list[Upload], str | None]:
        """A page of uploads, newest first, and where the next one starts."""
        params = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        page = self._get(UploadPage, "GET", "/datasets", params=params)
        return list(page.items), page.next

    def remove_upload(self, upload_id: str) -> None:
        """Remove an upload that no job needs."""
        self._ask("DELETE", f"/datasets/{quote(upload_id, safe='')}")

    def wait(
        self,
        job_id: str,
        *,
        on_change: Callable[[Job], None],
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
    ) -> Job:
        """Follow a job to its end; an API that is being restarted is waited for.

        Raises:
            ServiceAway: it has been away for longer than `patience_s`.
        """
        heard_at = time.monotonic()
        while True:
            try:
                job = self.job(job_id)
            except ServiceAway:
                if time.monotonic() - heard_at > patience_s:
                    raise
            else:
                heard_at = time.monotonic()
                on_change(job)
                if job.is_final:
                    return job
            time.sleep(poll_s)

    def watch(self, job_id: str, *, patience_s: float = PATIENCE_S) -> Iterator[Job]:
        """The job as it is now and after each change, by a stream of its events, to its end.

        Raises:
            ServiceAway: the service has been away for longer than `patience_s`.
        """
        job = self._patiently(lambda: self.job(job_id), patience_s)
        yield job
        if job.is_final:
            return
        for message in self._messages(_path(job_id, "events"), {}, patience_s=patience_s):
            if message.event == "progress":
                job = job.model_copy(update={"progress": self._read(Progress, message.data)})
            else:
                job = self._patiently(lambda: self.job(job_id), patience_s)
            yield job
            if job.is_final:
                return

    def follow_log(self, job_id: str, *, attempt: int | None = None, patience_s: float = PATIENCE_S) -> Iterator[str]:
        """The lines of a job's log, as they come, from the current attempt on to the end of the job.

        Args:
            job_id: of the job.
            attempt: only this one, to its end.
            patience_s: how long the service may be away.
        """
        # Named from the start: another attempt may have begun by the time that a lost connection is made again.
        begin = f"{attempt or max(1, self.job(job_id).attempt)}:0"
        params = {} if attempt is None else {"attempt": str(attempt)}
        for message in self._messages(_path(job_id, "logs"), params, patience_s=patience_s, last_id=begin):
            if message.event != "end":
                yield f"{message.data}\n"

    def _make(self, path: str, document: Mapping[str, JsonValue], key: str | None) -> Job:
        """A request that makes a job: sent again, under one key, until it is answered or too much time has passed."""
        headers = JSON | {"Idempotency-Key": key or uuid.uuid4().hex}
        body = _encode(document)
        return self._patiently(lambda: self._get(Job, "POST", path, content=body, headers=headers), RETRY_S)

    def _fetch(self, path: str, to: Path) -> Path:
        draft = to.with_name(f".{to.name}.part")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                with draft.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            draft.replace(to)
        except httpx.TransportError as error:
            draft.unlink(missing_ok=True)
            raise self._away(error) from error
        except OSError as error:
            raise ClientError.of("path", str(to), f"cannot be written: {error.strerror}", "Choose another.") from error
        return to


def _encode(document: Mapping[str, JsonValue]) -> str:
    try:
        return json.dumps(dict(document), allow_nan=False)
    except ValueError as error:
        raise ClientError.of("spec", None, f"cannot be sent: {error}", "Numbers must be finite.") from None


def _path(job_id: str, *parts: str) -> str:
    return "/".join(("/jobs", *(quote(part, safe="") for part in (job_id, *parts))))
