"""Routes: the files of a distilled set, one by one or in one zip.

Only names of the manifest that the job's last attempt left are served, from the paths that stand beside them there: a path of the
request is a key to look up and never a path to open.
"""

from __future__ import annotations

import hashlib
import mimetypes
import re
from collections.abc import Iterator
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse
from zipstream import ZipStream

from ncfm_core.errors import Problem, StorageError, shorten
from service.api.context import JobDep, StorageDep
from service.api.errors import Gone, NotFound, NotReady, RangeNotSatisfiable
from service.api.looking import names
from service.api.models import Artifact, ArtifactList
from service.api.openapi import problems
from service.jobs import Job
from worker.records import FileRecord
from worker.storage import Storage

router = APIRouter(tags=["artifacts"])

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BINARY = {"description": "The file", "content": {"application/octet-stream": {}}}


@router.get("/jobs/{id}/artifacts", responses=problems(404, 503), summary="List files")
def list_artifacts(job: JobDep) -> ArtifactList:
    """The manifest: empty before the job has succeeded."""
    return ArtifactList(
        items=[
            Artifact(
                name=file.name,
                size=file.size,
                sha256=file.sha256,
                href=f"/jobs/{job.id}/artifacts/{quote(file.name)}",
            )
            for file in job.artifacts
        ]
    )


@router.get(
    "/jobs/{id}/artifacts.zip",
    responses=problems(404, 409, 410, 503)
    | {200: {"description": "All files in one zip", "content": {"application/zip": {}}}},
    response_class=Response,
    summary="Download all",
)
def get_archive(job: JobDep, storage: StorageDep, request: Request) -> Response:
    """All files in one zip, stored and not compressed, so that its length is known at once and memory stays small."""
    if not job.artifacts:
        raise NotReady.of("state", str(job.state), "the job has no artifacts", _when_ready(job))
    for file in job.artifacts:
        _check_present(storage, file)
    archive = ZipStream(sized=True)
    for file in job.artifacts:
        archive.add(_verified(storage, file), file.name, size=file.size)
    headers = {
        "Content-Length": str(len(archive)),
        "Content-Disposition": f'attachment; filename="ncfm-{job.id}.zip"',
    }
    chunks = iter(()) if request.state.is_head else iter(archive)
    return StreamingResponse(chunks, media_type="application/zip", headers=headers)


@router.get(
    "/jobs/{id}/artifacts/{path:path}",
    responses=problems(404, 410, 416, 503)
    | {200: _BINARY, 206: _BINARY, 304: {"description": "The ETag in If-None-Match still holds"}},
    response_class=Response,
    summary="Download one",
)
def get_artifact(job: JobDep, path: str, storage: StorageDep, request: Request) -> Response:
    """One file, by its name in the manifest. One range of bytes may be asked for."""
    file = next((file for file in job.artifacts if file.name == path), None)
    if file is None:
        hint = f"GET /jobs/{job.id}/artifacts lists all." if job.artifacts else _when_ready(job)
        raise NotFound(Problem("path", shorten(path), "the job has no such artifact", hint))
    etag = f'"{file.sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=31536000, immutable"}
    if names(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    _check_present(storage, file)
    media_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    if not media_type.startswith("image/"):
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(file.name.rpartition('/')[2], safe='')}"
    wanted = _range(request, etag, file)
    start, end = wanted or (0, file.size)
    headers["Content-Length"] = str(end - start)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    chunks: Iterator[bytes] = iter(())
    if not request.state.is_head:
        chunks = _verified(storage, file) if wanted is None else storage.stream(file.path, start=start, end=end)
    return StreamingResponse(chunks, 200 if wanted is None else 206, headers, media_type)


def _when_ready(job: Job) -> str:
    if job.state.is_terminal:
        return f"It has {job.state}: only a job that succeeds leaves a set."
    return "They are there once it has succeeded."


def _check_present(storage: Storage, file: FileRecord) -> None:
    """While a status can still be chosen, make sure that the file can be sent."""
    if storage.size(file.path) != file.size:
        raise Gone.of("path", file.name, "the file has been removed or damaged", "Submit the job again.")


def _verified(storage: Storage, file: FileRecord) -> Iterator[bytes]:
    """The file in chunks; a damaged one breaks off before its end, so that no client takes it for whole."""
    digest = hashlib.sha256()
    held = b""
    for chunk in storage.stream(file.path):
        if held:
            yield held
        digest.update(chunk)
        held = chunk
    if digest.hexdigest() != file.sha256:
        raise StorageError.of("storage", file.path, "a committed file is damaged", "Submit the job again.")
    yield held


def _range(request: Request, etag: str, file: FileRecord) -> tuple[int, int] | None:
    """The bytes [start, end) that are asked for, or None for the whole file: also for what we do not understand.

    Raises:
        RangeNotSatisfiable: the range begins after the end.
    """
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if match is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        start, end = max(0, file.size - int(last)), file.size
    else:
        start, end = int(first), min(int(last) + 1, file.size) if last else file.size
        if last and int(last) < int(first):
            return None
    if start >= end:
        hint = f"The file has {file.size} bytes."
        error = RangeNotSatisfiable.of("Range", request.headers["range"], "outside the file", hint)
        error.headers = {"Content-Range": f"bytes */{file.size}"}
        raise error
    return start, end
