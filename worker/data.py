"""The data set of a job, from wherever its spec says: what `ncfm_core` reads are files on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.errors import DatasetError
from ncfm_core.spec import DatasetSpec
from worker.buckets import allowed_object, fetch_object, is_in_bucket
from worker.locations import allowed_path, check_links, fetch_upload, upload_id
from worker.settings import DataAccess
from worker.storage import Storage


def load(spec: DatasetSpec, access: DataAccess) -> Dataset:
    """Read a data set; what is no file is fetched first, and each must lie where data may lie, whatever links say.

    Raises:
        DatasetError: files are missing, damaged or out of bounds, or there is no room for them.
        StorageError: the storage root, which holds uploads, or a bucket cannot be read.
    """
    found = spec if spec.uri is None else spec.model_copy(update={"uri": str(_file(spec.uri, access))})
    try:
        return load_dataset(
            found,
            data_dir=access["data_dir"],
            allow_download=access["allow_download"],
            cache_dir=access["cache_dir"],
            memory_bytes=access["memory_bytes"],
        )
    except DatasetError as error:
        if spec.uri is None:
            raise
        # What was asked for, and not where its copy lies.
        problems = (replace(each, value=spec.uri) if each.field == "dataset.uri" else each for each in error.problems)
        raise DatasetError(*problems) from error


def _file(uri: str, access: DataAccess) -> Path:
    """Where the files of a URI are on this machine."""
    digest = upload_id(uri)
    if digest is not None:
        return fetch_upload(Storage(access["storage_url"]), digest, access["cache_dir"] / "uploads")
    if is_in_bucket(uri):
        return fetch_object(allowed_object(uri, access["data_buckets"]), access["cache_dir"] / "objects")
    path = allowed_path(uri, access["data_dir"], access["data_roots"])
    check_links(path, access["data_roots"])
    return path
