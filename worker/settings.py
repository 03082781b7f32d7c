"""Where a process finds its surroundings: environment variables `NCFM_*`. Light."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


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
    allow_download: bool = False
    """Whether a data set that is missing may be downloaded."""

    @property
    def storage_url(self) -> str:
        return self.storage or str(self.home / "storage")
