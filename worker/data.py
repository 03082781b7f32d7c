"""The data set of a job, from wherever its spec says: what `ncfm_core` reads are files on this machine."""

from __future__ import annotations

from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.spec import DatasetSpec
from worker.locations import allowed_path, check_links, fetch_upload, upload_id
from worker.settings import DataAccess
from worker.storage import Storage


def load(spec: DatasetSpec, access: DataAccess) -> Dataset:
    """Read a data set; an upload is fetched first, and a path must lie where data may lie, whatever its links say.

    Raises:
        DatasetError: files are missing, damaged or out of bounds, or there is no room for them.
        StorageError: the storage root, which holds uploads, cannot be read.
    """
    if spec.uri is not None:
        digest = upload_id(spec.uri)
        if digest is not None:
            path = fetch_upload(Storage(access["storage_url"]), digest, access["cache_dir"] / "uploads")
        else:
            path = allowed_path(spec.uri, access["data_dir"], access["data_roots"])
            check_links(path, access["data_roots"])
        spec = spec.model_copy(update={"uri": str(path)})
    return load_dataset(
        spec,
        data_dir=access["data_dir"],
        allow_download=access["allow_download"],
        cache_dir=access["cache_dir"],
        memory_bytes=access["memory_bytes"],
    )
