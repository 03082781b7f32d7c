"""Where a user's own images may lie: an upload below the storage root, or files below the folders that are allowed. Light."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ncfm_core.errors import DatasetError, StorageError
from worker.storage import Storage

UPLOAD = "upload:"
"""Before the sha256 of an upload, in `dataset.uri`."""
ENDINGS = (".tar", ".tar.gz", ".zip")
"""Of an upload's object."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 4 << 20


def upload_id(uri: str) -> str | None:
    """The sha256 that a URI `upload:<sha256>` names; None for any other URI.

    Raises:
        DatasetError: it is an upload's, but not of that form.
    """
    if not uri.startswith(UPLOAD):
        return None
    digest = uri.removeprefix(UPLOAD)
    if not _SHA256.fullmatch(digest):
        hint = "Give the id that POST /datasets answered: 64 hexadecimal digits."
        raise DatasetError.of("dataset.uri", uri, "not the name of an upload", hint)
    return digest


def upload_path(digest: str, ending: str) -> str:
    """Path of an upload below the storage root."""
    return f"uploads/{digest}{ending}"


def path_of(uri: str, data_dir: Path) -> Path:
    """The file or folder that a path or file:// URI names; a relative one is below `data_dir`. It need not exist.

    Raises:
        DatasetError: it names another host.
    """
    if not uri.startswith("file:"):
        return data_dir / Path(uri).expanduser()
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        hint = "Write three slashes before an absolute path: file:///data/birds.tar."
        raise DatasetError.of("dataset.uri", uri, f"names the host {parts.netloc}", hint)
    return data_dir / unquote(parts.path)


def allowed_path(uri: str, data_dir: Path, roots: Sequence[Path] | None) -> Path:
    """The real path behind a URI, with every link resolved, if it lies where data may lie.

    Args:
        uri: as `path_of` takes it.
        data_dir: for relative ones.
        roots: folders that data may lie in; None for any.

    Raises:
        DatasetError: it lies elsewhere.
    """
    try:
        real = path_of(uri, data_dir).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DatasetError.of("dataset.uri", uri, f"not a path: {error}", "Give a path or file:// URI.") from None
    if roots is not None:
        _check_below(real, uri, [root.resolve() for root in roots])
    return real


def check_links(folder: Path, roots: Sequence[Path] | None) -> None:
    """Refuse a folder with links that lead out of where data may lie: they are followed when it is read.

    Raises:
        DatasetError: it has one, which is named.
    """
    if roots is None or not folder.is_dir():
        return
    real_roots = [root.resolve() for root in roots]
    waiting, seen = [folder.resolve()], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.is_symlink():
                        path = path.resolve()
                        _check_below(path, entry.path, real_roots)
                    if path.is_dir() if entry.is_symlink() else entry.is_dir():
                        waiting.append(path)
        except OSError as error:
            raise DatasetError.of("dataset.uri", str(current), f"cannot be read: {error.strerror}", "") from None


def fetch_upload(storage: Storage, digest: str, folder: Path) -> Path:
    """A file with an upload's bytes, compared with its sha256.

    Args:
        storage: that holds it.
        digest: sha256 in hex: its name.
        folder: where a copy goes unless the storage root is a folder itself.

    Raises:
        DatasetError: there is no such upload, it is damaged, or there is no room for the copy.
        StorageError: the storage root cannot be read.
    """
    ending = next((each for each in ENDINGS if storage.size(upload_path(digest, each)) is not None), None)
    if ending is None:
        hint = "Upload the archive again: POST /datasets."
        raise DatasetError.of("dataset.uri", UPLOAD + digest, "there is no such upload", hint)
    path = upload_path(digest, ending)
    if "://" not in storage.url:
        file = Path(storage.url).expanduser() / path
        if _sha256(file) != digest:
            raise _damaged(digest)
        return file
    file = folder / f"{digest}{ending}"
    if not file.exists() or _sha256(file) != digest:
        _download(storage, path, digest, file)
    return file


def _download(storage: Storage, path: str, digest: str, to: Path) -> None:
    """Copy an object into a file, which appears whole and right or not at all."""
    hashed, draft = hashlib.sha256(), None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=to.parent, prefix=".upload-", suffix=".partial", delete=False) as out:
            draft = Path(out.name)
            for chunk in storage.stream(path):
                hashed.update(chunk)
                out.write(chunk)
        if hashed.hexdigest() != digest:
            raise _damaged(digest)
        draft.replace(to)
        draft = None
    except OSError as error:
        raise DatasetError.of("dataset.uri", str(to), f"cannot be written: {error.strerror}", "Make room.") from error
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise StorageError.of("storage", str(file), f"cannot be read: {error.strerror}", "") from error


def _check_below(real: Path, shown: str, roots: Sequence[Path]) -> None:
    if not any(real.is_relative_to(root) for root in roots):
        where = ", ".join(str(root) for root in roots) or "no folder at all"
        hint = f"Put the data below {where}, name another folder with NCFM_DATA_ROOTS, or upload it (POST /datasets)."
        raise DatasetError.of("dataset.uri", shown, "lies outside the folders that data may be read from", hint)


def _damaged(digest: str) -> DatasetError:
    return DatasetError.of("dataset.uri", UPLOAD + digest, "the upload is damaged", "Upload the archive again.")
