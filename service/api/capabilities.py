"""Route: what may be asked for here."""

from __future__ import annotations

from typing import get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ncfm_core.catalog import DATASETS, PresetName
from ncfm_core.networks import NETWORKS
from ncfm_core.protocols import PROTOCOLS
from ncfm_core.spec import JobSpec
from service.api.context import LOCAL, CallerDep, StreamsDep
from service.api.envelope import MAX_LABEL_CHARS, MAX_LABELS, MAX_PRIORITY
from service.api.guard import MAX_HEADER_BYTES, MAX_HEADERS
from service.api.jobs import MAX_WAIT_S
from service.api.listing import MAX_LIMIT
from service.api.log_reading import MAX_LINES
from service.api.models import Body
from service.api.once import MAX_KEY_CHARS
from service.api.openapi import problems
from service.api.submission import MAX_BODY_BYTES
from service.api.uploads import MAX_AT_ONCE, SILENCE_S
from service.settings import Settings

router = APIRouter(tags=["service"])


class DatasetBody(Body):
    """A data set by its name. What is null is counted when a job inspects the data."""

    name: str
    title: str
    classes: int | None
    channels: int
    image_size: int
    train_images: int | None
    test_images: int | None
    max_ipc: int | None
    """Training images of its smallest class."""
    presets: list[str]
    default_preset: str


class MethodBody(BaseModel):
    """A method with the JSON Schema of its fields."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True, validate_by_name=True)

    name: str
    json_schema: dict[str, JsonValue] = Field(alias="schema")


class NetworkBody(Body):
    name: str
    title: str
    norms: list[str]


class Limits(Body):
    """What this service takes."""

    headers: int
    """Of one request."""
    header_bytes: int
    """Of all headers of a request together."""
    body_bytes: int
    page_items: int
    priority: int
    labels: int
    label_chars: int
    idempotency_key_chars: int
    wait_seconds: float
    log_lines: int
    """Of one page of a log."""
    streams: int
    """Open at once, in one process: event streams and long polls."""
    streams_per_owner: int
    upload_bytes: int
    """Of one archive."""
    uploads_at_once: int
    """In one process, over all callers."""
    upload_silence_seconds: float
    """Within an upload."""
    changes_per_minute: int | None
    """By one key, in one process; null where the caller needs no key and has no such bound."""
    wrong_keys_per_minute: int
    """From one address, in one process."""
    running_jobs: int
    """On the cluster at once, by the settings of this process; further ones wait."""
    running_jobs_per_owner: int | None
    """The same for one owner; null where there is no such bound."""


class Capabilities(Body):
    """What may be asked for."""

    datasets: list[DatasetBody]
    methods: list[MethodBody]
    networks: list[NetworkBody]
    protocols: list[str]
    presets: list[str]
    limits: Limits


@router.get("/capabilities", responses=problems(422), summary="What may be asked for")
def get_capabilities(streams: StreamsDep, caller: CallerDep, request: Request) -> Capabilities:
    """Data sets, methods with their JSON Schema, networks, protocols, presets and limits."""
    settings: Settings = request.app.state.settings
    datasets = [
        DatasetBody(
            name=facts.name,
            title=facts.title,
            classes=None if facts.assumed and not facts.wnids else facts.num_classes,
            channels=facts.channels,
            image_size=facts.image_size,
            train_images=None if facts.assumed else facts.num_train,
            test_images=None if facts.assumed else facts.num_test,
            max_ipc=None if facts.assumed else facts.smallest_class,
            presets=list(facts.presets),
            default_preset=facts.default_preset,
        )
        for facts in DATASETS.values()
    ]
    return Capabilities(
        datasets=datasets,
        methods=_methods(),
        networks=[NetworkBody(name=each.name, title=each.title, norms=list(each.norms)) for each in NETWORKS.values()],
        protocols=list(PROTOCOLS),
        presets=list(get_args(PresetName)),
        limits=Limits(
            headers=MAX_HEADERS,
            header_bytes=MAX_HEADER_BYTES,
            body_bytes=MAX_BODY_BYTES,
            page_items=MAX_LIMIT,
            priority=MAX_PRIORITY,
            labels=MAX_LABELS,
            label_chars=MAX_LABEL_CHARS,
            idempotency_key_chars=MAX_KEY_CHARS,
            wait_seconds=MAX_WAIT_S,
            log_lines=MAX_LINES,
            streams=streams.max_streams,
            streams_per_owner=streams.max_streams_per_owner,
            upload_bytes=settings.max_upload_bytes,
            uploads_at_once=MAX_AT_ONCE,
            upload_silence_seconds=SILENCE_S,
            changes_per_minute=None if caller.owner == LOCAL else settings.rate_limit_per_minute,
            wrong_keys_per_minute=settings.rate_limit_per_minute,
            running_jobs=settings.max_running_jobs,
            running_jobs_per_owner=settings.max_running_per_owner,
        ),
    )


def _methods() -> list[MethodBody]:
    """Every method that a spec may have, by the constants of its `name`."""
    annotation = JobSpec.model_fields["method"].annotation
    models: tuple[type[BaseModel], ...] = get_args(annotation) or (annotation,)
    return [
        MethodBody.model_validate({"name": name, "schema": model.model_json_schema()})
        for model in models
        for name in get_args(model.model_fields["name"].annotation)
    ]
