"""What a submission may say of its data: no secrets, no path outside of what is allowed, no upload that is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import JsonValue

from ncfm_core.catalog import DatasetFacts
from ncfm_core.errors import DatasetError, Problem, SpecError, shorten
from ncfm_core.spec import JobSpec
from service.api.guard import is_loopback
from service.settings import Settings
from service.uploads import Uploads
from worker.buckets import allowed_object, is_in_bucket
from worker.locations import allowed_path, upload_id
from worker.redaction import redact


class Sources:
    """Checks submissions before they are kept: what is kept is read by many, and for long."""

    def __init__(self, settings: Settings, uploads: Uploads) -> None:
        self._uploads, self._data_dir = uploads, settings.data_dir
        self._roots, self._buckets = settings.data_roots, settings.data_buckets
        if self._roots is None and not is_loopback(settings.host):
            self._roots = (settings.data_dir,)

    def check(self, document: Mapping[str, JsonValue]) -> None:
        """Refuse a submission (as it was sent, or resolved) that names data which it may not.

        Raises:
            SpecError: it names the field and the way out.
        """
        secrets = [
            Problem(path, shorten(redact(text)), "holds a secret, and a spec is kept and shown to others", _NO_SECRETS)
            for path, text in _texts(document)
            if redact(text) != text
        ]
        if secrets:
            raise SpecError(*secrets)
        dataset = document.get("dataset")
        uri = dataset.get("uri") if isinstance(dataset, dict) else None
        if not isinstance(uri, str):
            return
        try:
            digest = upload_id(uri)
            if is_in_bucket(uri):
                allowed_object(uri, self._buckets)
            elif digest is None:
                allowed_path(uri, self._data_dir, self._roots)
        except DatasetError as error:
            raise SpecError(*error.problems) from None
        if digest is not None:
            self._check_upload(digest, document.get("ipc"))

    def facts(self, spec: JobSpec) -> DatasetFacts:
        """What is known of the data before a job looks at them: of an upload, what was counted when it was taken."""
        facts, uri = spec.dataset.facts, spec.dataset.uri
        digest = upload_id(uri) if uri is not None else None
        upload = self._uploads.get(digest) if digest is not None else None
        return facts if upload is None else upload.refine(facts)

    def _check_upload(self, digest: str, ipc: JsonValue) -> None:
        upload = self._uploads.get(digest)
        if upload is None:
            hint = "GET /datasets lists all."
            raise SpecError.of("dataset.uri", f"upload:{digest}", "there is no such upload", hint)
        if isinstance(ipc, int) and ipc > upload.smallest_class:
            message = f"more images per class than the smallest class of the upload has ({upload.smallest_class})"
            raise SpecError.of("ipc", ipc, message, f"Choose 1 to {upload.smallest_class}.")


_NO_SECRETS = (
    "Leave it out: let the cluster's nodes have what they need to read the data, or upload the data (POST /datasets)."
)


def _sources(request: Request) -> Sources:
    sources = request.app.state.sources
    assert isinstance(sources, Sources)
    return sources


SourcesDep = Annotated[Sources, Depends(_sources)]


def _texts(document: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """Every text in a document, keys too, with its path. Without recursion."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend((f"{path}.{key}" if path else str(key), child) for key, child in value.items())
            yield from ((f"{path}.{redact(str(key))}".lstrip("."), str(key)) for key in value)
        elif isinstance(value, list | tuple):
            waiting.extend((f"{path}.{index}", child) for index, child in enumerate(value))
        elif isinstance(value, str):
            yield path, value
