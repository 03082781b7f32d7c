"""Where a process finds its surroundings: environment variables `NCFM_*`. Light."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.buckets import place_of


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


def listed(value: object) -> object:
    """Text with commas as its parts."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _listed_or_none(value: object) -> object:
    return listed(value) or None


def _plain_prefixes(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    for prefix in prefixes:
        try:
            place_of(prefix)
        except ValueError as error:
            raise ValueError(f"one of the prefixes {error}; write them as s3://birds/archives,gs://fish") from None
    return prefixes


class DataAccess(TypedDict):
    """Where data sets are and how much of one may be in memory: what `worker.data.load` wants to know."""

    data_dir: Path
    allow_download: bool
    cache_dir: Path
    memory_bytes: int
    storage_url: str
    data_roots: tuple[Path, ...] | None
    data_buckets: tuple[str, ...]


class Surroundings(BaseSettings):
    """What the service and the worker both need to know."""

    model_config = SettingsConfigDict(env_prefix="NCFM_", use_attribute_docstrings=True, extra="ignore")

    home: AbsolutePath = Field(default=Path("~/.ncfm"), validate_default=True)
    """Folder of the embedded stack's state."""
    storage: str = ""
    """Storage root: a folder or a URL such as s3://bucket/prefix; empty for `storage` below `home`."""
    mlflow_url: str = ""
    """MLflow tracking server; empty where there is none."""
    mlflow_public_url: str = ""
    """The same server as people reach it; empty for `mlflow_url`."""
    data_dir: AbsolutePath = Field(default=Path("~/.ncfm/data"), validate_default=True)
    """Data sets in torchvision's layout."""
    data_roots: Annotated[tuple[AbsolutePath, ...] | None, NoDecode, BeforeValidator(_listed_or_none)] = None
    """Folders, with commas between, that an `imagefolder` may be read from; unset for any.

    Where others reach the API, it takes `data_dir` alone unless this is set."""
    data_buckets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed), AfterValidator(_plain_prefixes)] = ()
    """What of buckets an `imagefolder` may be read from: prefixes such as s3://birds/archives, with commas between."""
    allow_download: bool = False
    """Whether a data set that is missing may be downloaded."""
    cache_dir: AbsolutePath | None = None
    """Where images of data sets larger than `data_memory_gib` go, readable on every node; else `converted` below `data_dir`."""
    data_memory_gib: Annotated[float, Field(gt=0, le=4096)] = 2.0
    """Images of a data set that take more than this stay in a file, in each task."""

    @property
    def data_access(self) -> DataAccess:
        """How this process and its tasks come by data sets."""
        return {
            "data_dir": self.data_dir,
            "allow_download": self.allow_download,
            "cache_dir": self.cache_dir or self.data_dir / "converted",
            "memory_bytes": int(self.data_memory_gib * 2**30),
            "storage_url": self.storage_url,
            "data_roots": self.data_roots,
            "data_buckets": self.data_buckets,
        }

    @property
    def storage_url(self) -> str:
        """The root; a local one is absolute, since processes of several folders share it."""
        url = self.storage or str(self.home / "storage")
        return url if "://" in url else str(_absolute(Path(url)))


RAY_ADDRESS = "RAY_ADDRESS"
TRACKING = {
    # A call to a server that is away must end soon: whoever makes it knows how to try again.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}


def ray_address() -> str | None:
    """The cluster that this process was given; None for none, and then it may start its own."""
    return os.environ.get(RAY_ADDRESS) or None


def prepare_tracking() -> None:
    """Set up the MLflow client of this process; what the user has set stays."""
    for name, value in TRACKING.items():
        os.environ.setdefault(name, value)


def prepare_trial() -> None:
    """Let Ray Tune wait for a trial that it has stopped before it uses the process again; what the user has set stays.

    After its 2 s, which a busy machine needs and more, the next trial of that process would be lost.
    """
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")


def prepare_search() -> None:
    """Leave the signals of this process with it: Ray Tune would take Ctrl-C for the regular end of the search."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"


def prepare_own_ray() -> None:
    """Let a Ray cluster of this process's own listen on 127.0.0.1, for a token that only it and its workers know."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for one machine: its servers listen on 127.0.0.1 alone


def http_options() -> dict[str, str | bool]:
    """What this process's environment says of connections to buckets, for a client that is given options of its own.

    Giving obstore any option has it forget those that it would find in the environment.
    """
    found: dict[str, str | bool] = {}
    for prefix in ("AWS", "GOOGLE", "AZURE"):
        for option in ("allow_http", "allow_invalid_certificates"):
            value = os.environ.get(f"{prefix}_{option.upper()}", "").strip().lower()
            if value:
                found[option] = value in ("1", "true", "on", "yes", "y")
        for option in ("proxy_url", "proxy_ca_certificate", "proxy_excludes"):
            if text := os.environ.get(f"{prefix}_{option.upper()}"):
                found[option] = text
    return found
