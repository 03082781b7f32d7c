"""Routes: upload an archive of images, list what was uploaded, remove it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path as FilePath
from typing import IO, Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import JsonValue
from starlette.requests import ClientDisconnect

from ncfm_core.errors import Problem, shorten
from service import archives
from service.api.context import CallerDep, StoreDep, check_owner
from service.api.errors import (
    BodyTooLarge,
    Conflict,
    DigestMismatch,
    InsufficientStorage,
    InvalidParameter,
    MalformedBody,
    NotFound,
    RequestTimeout,
    TooManyRequests,
    UnsupportedMediaType,
)
from service.api.faults import UPLOAD_CURSOR
from service.api.models import Body
from service.api.openapi import problems
from service.archives import ArchiveRefused, Kind
from service.uploads import NoRoom, Upload, Uploads, no_room, user_of
from worker.records import now

router = APIRouter(tags=["datasets"])

KINDS: dict[str, Kind] = {"application/x-tar": "tar", "application/gzip": "tar.gz", "application/zip": "zip"}
WRITE_BYTES = 1 << 20
"""So much is gathered before a thread writes it."""
_ID = re.compile(r"[0-9a-f]{64}")
SILENCE_S = 60.0
"""A sender that sends nothing for this long is given up."""
MAX_AT_ONCE = 4
"""Uploads that this process takes at once."""
LOOK_TIMEOUT_S = 4 * 3600.0
"""To look into one archive."""


class ClassCounts(Body):
    """Images of one class."""

    train: int
    test: int


class UploadBody(Body):
    """An uploaded archive of images."""

    id: str
    """sha256 of its bytes, in hex."""
    name: str
    uri: str
    """What `dataset.uri` of a submission is set to: `upload:<id>`."""
    owner: str
    """Who sent it first, of those who have it still."""
    owners: list[str]
    """Everybody who sent these bytes and has not removed them."""
    kind: str
    size: int
    """Bytes."""
    num_classes: int
    num_train: int
    num_test: int
    smallest_class: int
    """Training images of the smallest class: the greatest `ipc` that is possible."""
    split: str
    """`train and test`, `train and val`, or `ours`: one image in five of each class is for testing."""
    ignored_files: int
    created_at: datetime

    @classmethod
    def of(cls, upload: Upload) -> UploadBody:
        return cls(**_summary(upload))


class UploadDetails(UploadBody):
    """An uploaded archive with its classes."""

    classes: dict[str, ClassCounts]

    @classmethod
    def of(cls, upload: Upload) -> UploadDetails:
        counts = {name: ClassCounts(train=train, test=test) for name, (train, test) in upload.classes.items()}
        return cls(**_summary(upload), classes=counts)


class UploadList(Body):
    """A page of uploads, newest first."""

    items: list[UploadBody]
    next: str | None
    """`cursor` for the next page, or null on the last one."""


@dataclass(slots=True)
class Taking:
    """What the routes of uploads share in one application."""

    max_bytes: int
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))


def _uploads(request: Request) -> Uploads:
    return Uploads(request.app.state.store, request.app.state.storage)


UploadsDep = Annotated[Uploads, Depends(_uploads)]


def _upload(
    upload_id: Annotated[str, Path(alias="id", description="sha256 of the upload.")], all_: UploadsDep
) -> Upload:
    found = all_.get(upload_id) if _ID.fullmatch(upload_id) else None
    if found is None:
        raise NotFound(Problem("id", shorten(upload_id), "there is no such upload", "GET /datasets lists all."))
    return found


UploadDep = Annotated[Upload, Depends(_upload)]
_BINARY: dict[str, Any] = {media: {"schema": {"type": "string", "format": "binary"}} for media in KINDS}


@router.post(
    "/datasets",
    status_code=201,
    responses=problems(400, 408, 413, 415, 422, 503, 507)
    | {200: {"description": "These bytes are here already", "model": UploadDetails}},
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
    summary="Upload images",
)
async def upload_dataset(
    request: Request,
    response: Response,
    uploads: UploadsDep,
    caller: CallerDep,
    name: Annotated[str, Query(min_length=1, max_length=128, description="What people will know it by.")],
) -> UploadDetails:
    """Send a .tar, .tar.gz or .zip with one folder of images for each class, as the body itself.

    It is kept under the sha256 of its bytes: sending it again is safe, and answers 200 with the same id. Whoever
    sends bytes that are here already is an owner beside the others: each removes it for itself alone. A sum in
    `Repr-Digest` or `Content-Digest` (`sha-256=:...:`) is compared. It is looked into before it is kept; whatever breaks off
    leaves nothing.
    """
    taking: Taking = request.app.state.taking
    if not name.isprintable():
        raise InvalidParameter.of("name", name, "not printable", "Use letters, digits and spaces.")
    kind, expected = _kind(request), _expected_digests(request)
    declared = _declared_size(request, taking.max_bytes)
    if taking.slots.locked():
        error = TooManyRequests.of("", None, f"{MAX_AT_ONCE} uploads are under way", "Try again in 10 s.")
        error.headers = {"Retry-After": "10"}
        raise error
    async with taking.slots:
        try:
            with await run_sync(uploads.spool, declared) as file:
                size, digest = await _receive(request, file, taking.max_bytes)
                _compare(digest, expected)
                upload, is_new = await _take(
                    uploads, file, kind=kind, size=size, digest=digest, name=name, owner=caller.owner
                )
        except NoRoom as error:
            raise InsufficientStorage(*error.problems) from error
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{upload.id}"
    return UploadDetails.of(upload)


@router.get("/datasets", responses=problems(422, 503), summary="List uploads")
def list_uploads(
    uploads: UploadsDep,
    limit: Annotated[int, Query(ge=1, le=200, description="Most items of the page.")] = 50,
    cursor: Annotated[str | None, Query(pattern=UPLOAD_CURSOR, description="`next` of the page before.")] = None,
) -> UploadList:
    """What was uploaded, newest first."""
    found = uploads.page(limit=limit + 1, after=cursor)
    if found is None:
        raise InvalidParameter.of("cursor", cursor, "not a cursor of this list", "Pass `next` of the page before.")
    page = found[:limit]
    return UploadList(
        items=[UploadBody.of(upload) for upload in page], next=page[-1].id if len(found) > len(page) else None
    )


@router.get("/datasets/{id}", responses=problems(404, 503), summary="Look at an upload")
def get_upload(upload: UploadDep) -> UploadDetails:
    """The upload, with its classes."""
    return UploadDetails.of(upload)


@router.delete("/datasets/{id}", status_code=204, responses=problems(404, 409, 503), summary="Remove an upload")
def delete_upload(upload: UploadDep, uploads: UploadsDep, store: StoreDep, caller: CallerDep) -> None:
    """Remove an upload for its caller, unless a job that has not ended needs it; its bytes go with its last owner.

    A caller with scope `admin` who has not sent it removes it for everybody.
    """
    is_own = caller.owner in upload.owners
    check_owner(caller, caller.owner if is_own else upload.owner, f"upload {upload.id[:12]}")
    user = user_of(store, upload)
    if user is not None:
        job_id, state = user
        hint = f"Wait for its end, or cancel it: POST /jobs/{job_id}/cancel."
        raise Conflict.of("id", upload.id, f"job {job_id} is {state} and needs it", hint)
    uploads.release(upload, [caller.owner] if is_own else upload.owners)


async def _receive(request: Request, file: IO[bytes], max_bytes: int) -> tuple[int, str]:
    """Write the body into a file; its size and sha256."""
    digest, size, held = hashlib.sha256(), 0, bytearray()

    def write(data: bytes, *, is_last: bool = False) -> None:
        digest.update(data)
        try:
            file.write(data)
            if is_last:
                file.flush()
        except OSError as error:
            raise no_room(error) from error

    chunks = request.stream()
    try:
        while True:
            with anyio.fail_after(SILENCE_S):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            held += chunk
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(size, max_bytes)
            if len(held) >= WRITE_BYTES:
                await run_sync(write, bytes(held))
                held.clear()
    except TimeoutError:
        hint = "Send it again."
        raise RequestTimeout.of("body", f"{size} bytes", f"nothing came for {SILENCE_S:.0f} s", hint) from None
    except ClientDisconnect:
        raise MalformedBody.of("body", f"{size} bytes", "broken off", "Send it again.") from None
    await run_sync(partial(write, bytes(held), is_last=True))
    if not size:
        raise MalformedBody.of("body", None, "empty", "Send the archive as the body itself.")
    return size, digest.hexdigest()


async def _take(
    uploads: Uploads, file: IO[bytes], *, kind: Kind, size: int, digest: str, name: str, owner: str
) -> tuple[Upload, bool]:
    """Look into the archive, unless it is here already, and keep it for its owner; whether it is new."""
    known = await run_sync(uploads.get, digest)
    if known is not None and await run_sync(uploads.is_stored, known):
        facts = known.facts
    else:
        facts = {"kind": kind, **await _look(file, kind)}
    upload = Upload(id=digest, owner=owner, name=name, size=size, facts=facts, created_at=now())
    return await run_sync(uploads.commit, upload, file), known is None


async def _look(file: IO[bytes], kind: Kind) -> dict[str, JsonValue]:
    """Have a process of its own look into the archive; it ends with the request."""
    root = FilePath(archives.__file__).parents[1]
    command = [sys.executable, "-m", "service.archives", kind]
    # Nothing of our environment: it holds secrets, and the archive is a stranger's.
    environment = {"PYTHONPATH": str(root), "PATH": os.defpath}
    try:
        with anyio.fail_after(LOOK_TIMEOUT_S):
            done = await anyio.run_process(command, stdin=file, env=environment, check=False)
    except TimeoutError:
        hint = "Send it in parts, or put it where the cluster reads files and name its path."
        message = f"refused: to look into it takes longer than {LOOK_TIMEOUT_S / 60:.0f} min"
        raise ArchiveRefused.of("body", None, message, hint) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        hint = "Is it a plain archive of images? Pack it anew, or in parts."
        message = f"refused: to look into it ended with exit code {done.returncode}"
        raise ArchiveRefused.of("body", None, message, hint) from None
    if "problems" in answer:
        raise ArchiveRefused(*(Problem(**problem) for problem in answer["problems"]))
    facts: dict[str, JsonValue] = answer["facts"]
    return facts


def _kind(request: Request) -> Kind:
    given = request.headers.get("content-type", "")
    kind = KINDS.get(given.partition(";")[0].strip().lower())
    if kind is None:
        raise UnsupportedMediaType.of("Content-Type", given, "not an archive", f"Send one of: {', '.join(KINDS)}.")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType.of("Content-Encoding", encoding, "is not supported", "Send the archive as it is.")
    return kind


def _declared_size(request: Request, max_bytes: int) -> int | None:
    declared = request.headers.get("content-length", "")
    if not declared.isdigit():
        return None
    if int(declared[:20]) > max_bytes:
        raise _too_large(int(declared[:20]), max_bytes)
    return int(declared)


def _too_large(size: int, max_bytes: int) -> BodyTooLarge:
    hint = "Put it where the cluster reads files and name its path, or have NCFM_MAX_UPLOAD_BYTES raised."
    return BodyTooLarge(Problem("body", f"{size} bytes", f"larger than {max_bytes} bytes", hint))


def _expected_digests(request: Request) -> list[tuple[str, bytes]]:
    """Sums of the body that the headers give: name of the header and sha256."""
    found = []
    for header in ("repr-digest", "content-digest"):
        for part in request.headers.get(header, "").split(","):
            algorithm, _, value = part.strip().partition("=")
            if algorithm.strip().lower() != "sha-256":
                continue
            try:
                digest = base64.b64decode(value.strip().removeprefix(":").removesuffix(":"), validate=True)
            except binascii.Error:
                digest = b""
            if len(digest) != hashlib.sha256().digest_size:
                raise InvalidParameter.of(header, value, "not a sha256", "Write it as sha-256=:<base64>:.")
            found.append((header, digest))
    return found


def _compare(digest: str, expected: list[tuple[str, bytes]]) -> None:
    for header, wanted in expected:
        if wanted.hex() != digest:
            message = f"the body has another sha256: {digest}"
            raise DigestMismatch.of(header, wanted.hex(), message, "It was damaged on its way: send it again.")


def _summary(upload: Upload) -> dict[str, Any]:
    counts = upload.classes.values()
    shown = {name: getattr(upload, name) for name in ("id", "name", "uri", "owner", "owners", "size", "created_at")}
    facts = {name: upload.facts[name] for name in ("kind", "split", "ignored_files")}
    return {
        **shown,
        **facts,
        "num_classes": len(counts),
        "num_train": sum(train for train, _ in counts),
        "num_test": sum(test for _, test in counts),
        "smallest_class": upload.smallest_class,
    }
