"""Settings of the service's processes: environment variables `NCFM_*`. The only place that reads the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import NoDecode

from ncfm_core.errors import NcfmError, Problem, shorten
from worker.redaction import redact
from worker.settings import Surroundings, listed

STORAGE_PATIENCE_S = 5.0
"""How long the service waits for a storage root that does not answer: jobs and streams that need none of it must go on."""

Days = Annotated[float, Field(ge=0, le=100_000)]


class Settings(Surroundings):
    """What api, controller and the embedded stack need beyond the worker's surroundings."""

    database_url: str = ""
    """SQLAlchemy URL; empty for `ncfm.db` below `home`."""
    host: str = "127.0.0.1"
    """Address the API binds to."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """Port of the API; 0 for a free one (embedded stack only)."""
    public_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)] = ()
    """Names by which the API may be called beside this machine's and the one it is bound to; `*` for any."""
    auth: Literal["auto", "required", "off"] = "auto"
    """Whether callers need a key: `auto` where others reach the API, and on loopback once there is a key at all."""
    api_key: SecretStr | None = None
    """Key that the command line sends."""
    rate_limit_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 600
    """Requests of one key that change something, and wrong keys from one address; as many may come at once."""
    max_upload_bytes: Annotated[int, Field(ge=1, le=1 << 50)] = 20 << 30
    """Of one uploaded archive."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Of the lines on standard error: `auto` is text on a terminal, else JSON."""
    ray_url: str = "http://127.0.0.1:8265"
    """Ray's dashboard, which serves the Jobs REST API."""
    ray_token_path: Path | None = None
    """File with Ray's authentication token; none where Ray asks for none."""
    ray_token: SecretStr | None = None
    """The token itself, where there is no file."""
    worker_python: str = "python"
    """The interpreter of a driver, as found on the cluster's nodes."""
    max_running_jobs: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Jobs on the cluster at once, at most."""
    max_running_per_owner: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """The same for the jobs of one owner; none for no such limit."""
    max_infra_retries: Annotated[int, Field(ge=0, le=1000)] = 10
    """New attempts after losses in a row that are not the user's fault: one that had made progress begins a new row."""
    max_error_retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """New attempts after errors of the attempt itself that may pass."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Pause between two rounds of the controller."""
    lease_seconds: Annotated[float, Field(ge=0.5, le=3600)] = 15.0
    """Without a sign from the active controller for this long, another one takes over."""
    crash_at: str = ""
    """For tests alone: the point at which the controller ends itself as kill -9 would (service/controller/crash_points.py)."""
    keep_events_days: Days = 30
    """Events of a job that has ended, other than the last ones."""
    keep_deleted_days: Days = 7
    """Rows and files of a job that was deleted."""
    keep_checkpoints_days: Days = 7
    """Checkpoints of a job that was cancelled with `checkpoint: true`; those of other jobs that have ended are not kept."""
    keep_keys_hours: Annotated[float, Field(ge=1, le=10_000)] = 72
    """How long a repeated request is known by its Idempotency-Key."""
    keep_audit_days: Days = 90
    """What was done by whom."""
    keep_temporary_days: Days = 1
    """Objects that no result and no job refers to, as a killed attempt leaves them."""
    keep_cache_days: Days | None = None
    """Stage results that no job refers to; for ever, unless set."""

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'ncfm.db'}"


class SettingsError(NcfmError):
    """A variable NCFM_* has a value that it may not have."""

    code = "invalid_settings"


def load_settings() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: it names each variable that is at fault.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(
            *(_problem(str(each["loc"][0]), each["input"], each["msg"]) for each in error.errors())
        ) from None


def _problem(name: str, value: object, message: str) -> Problem:
    return Problem(
        f"NCFM_{name.upper()}", redact(shorten(value)), message[0].lower() + message[1:], "Change or unset it."
    )
