"""A typed client of the HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import JsonValue, TypeAdapter, ValidationError

from ncfm_core.errors import NcfmError
from service.replies import Artifact, ArtifactPage, Event, EventPage, Job, JobPage, Upload, UploadPage, problems_of

CONNECT_TIMEOUT_S = 3.0
TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 3600.0
"""The service looks into an archive before it answers."""
POLL_S = 0.5
PATIENCE_S = 60.0
"""Longer than a supervisor takes to start the API again."""

T = TypeVar("T")


class ClientError(NcfmError):
    """The service refuses what was asked."""

    code = "client_error"


class ServiceAway(ClientError):
    """No service answers at the address."""

    code: ClassVar[str] = "service_away"


class Client:
    """The API at one address.

    Raises:
        ServiceAway: by every method, when nothing answers.
        ClientError: by every method, when the service refuses; it names field, value and way out.
    """

    def __init__(self, url: str, *, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        """Open nothing yet.

        Args:
            url: of the API, such as http://127.0.0.1:8000.
            key: of the API (`ncfm_...`), where it asks for one.
            transport: in place of the network.
        """
        self.url = url.rstrip("/")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise ClientError.of("NCFM_API_KEY", None, "not a key of the API", "`ncfm keys create` makes one.")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={} if key is None else {"Authorization": f"Bearer {key.strip()}"},
                timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                transport=transport,
                # A proxy cannot see this machine's loopback.
                trust_env=httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ClientError.of("url", url, f"not an address: {error}", "Try http://127.0.0.1:8000.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, document: Mapping[str, JsonValue]) -> Job:
        """Hand in a submission, such as `{"dataset": "digits", "ipc": 1}`."""
        try:
            body = json.dumps(dict(document), allow_nan=False)
        except ValueError as error:
            raise ClientError.of("spec", None, f"cannot be sent: {error}", "Numbers must be finite.") from None
        return self._get(Job, "POST", "/jobs", content=body, headers={"Content-Type": "application/json"})

    def jobs(self, *, limit: int = 50, cursor: str | None = None) -> tuple[list[Job], str | None]:
        """A page of jobs, newest first, and where the next one starts."""
        params = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        page = self._get(JobPage, "GET", "/jobs", params=params)
        return list(page.items), page.next

    def job(self, job_id: str) -> Job:
        return self._get(Job, "GET", _path(job_id))

    def events(self, job_id: str) -> Iterator[Event]:
        """Everything that has happened to a job, in order."""
        after: int | None = 0
        while after is not None:
            page = self._get(EventPage, "GET", _path(job_id, "events"), params={"after": str(after)})
            yield from page.items
            after = page.next

    def cancel(self, job_id: str) -> Job:
        return self._get(Job, "POST", _path(job_id, "cancel"))

    def logs(self, job_id: str) -> str:
        """What the driver of the last attempt has printed."""
        return self._ask("GET", _path(job_id, "logs")).text

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

    def _get(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        response = self._ask(method, path, **options)
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._stranger(f"{kind.__name__}.{where}: {first['msg']}") from None

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._away(error) from error
        if not response.is_success:
            raise self._refusal(response)
        return response

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

    def _away(self, error: Exception) -> ServiceAway:
        why = str(error) or type(error).__name__
        return ServiceAway.of("url", self.url, f"no service answers: {why}", "Is it running? See `ncfm status`.")

    def _stranger(self, what: str) -> ClientError:
        return ClientError.of("url", self.url, f"not the API of this service ({what})", "Check the address.")

    def _refusal(self, response: httpx.Response) -> ClientError:
        try:
            document = TypeAdapter(dict[str, JsonValue]).validate_json(response.content)
        except ValidationError:
            return self._stranger(f"{response.request.url.path} answers {response.status_code}")
        return ClientError(*problems_of(document))


def _path(job_id: str, *parts: str) -> str:
    return "/".join(("/jobs", *(quote(part, safe="") for part in (job_id, *parts))))
