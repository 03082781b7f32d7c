"""Data from where a spec says: uploads below the storage root, and paths that stay where data may lie."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncfm_core.errors import DatasetError
from ncfm_core.spec import DatasetSpec
from worker.data import load
from worker.locations import allowed_path, check_links, fetch_upload, upload_id
from worker.settings import Surroundings
from worker.storage import Storage


def packed() -> bytes:
    out, rng = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("cat", "dog"):
            for index in range(3):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(image, "PNG")
                archive.writestr(zipfile.ZipInfo(f"{name}/{index}.png"), image.getvalue())
    return out.getvalue()


def spec(uri: str) -> DatasetSpec:
    return DatasetSpec(name="imagefolder", uri=uri, image_size=8)


@pytest.fixture
def surroundings(tmp_path: Path) -> Surroundings:
    data = tmp_path / "data"
    data.mkdir()
    return Surroundings(home=tmp_path, storage=str(tmp_path / "storage"), data_dir=data, data_roots=(data,))


def test_upload_is_read_as_its_archive_is(surroundings: Surroundings) -> None:
    data = packed()
    digest = hashlib.sha256(data).hexdigest()
    Storage(surroundings.storage_url).put(f"uploads/{digest}.zip", data)
    (surroundings.data_dir / "animals.zip").write_bytes(data)
    by_upload, by_path = (load(spec(uri), surroundings.data_access) for uri in (f"upload:{digest}", "animals.zip"))
    assert by_upload.digest == by_path.digest


def test_upload_when_it_is_not_there_or_damaged_says_so(surroundings: Surroundings) -> None:
    data = packed()
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(DatasetError, match="no such upload"):
        load(spec(f"upload:{digest}"), surroundings.data_access)
    Storage(surroundings.storage_url).put(f"uploads/{digest}.zip", data[:-1] + b"x")
    with pytest.raises(DatasetError, match="damaged"):
        load(spec(f"upload:{digest}"), surroundings.data_access)
    for wrong in ("upload:", "upload:abc", f"upload:{digest.upper()}", f"upload:../{digest}"):
        with pytest.raises(DatasetError, match="not the name of an upload"):
            load(spec(wrong), surroundings.data_access)
    assert upload_id("birds.tar") is None


def test_upload_on_a_root_that_is_no_folder_is_copied_once_and_compared(tmp_path: Path) -> None:
    data, storage, folder = packed(), Storage("memory://"), tmp_path / "cache" / "uploads"
    digest = hashlib.sha256(data).hexdigest()
    storage.put(f"uploads/{digest}.tar.gz", data)
    file = fetch_upload(storage, digest, folder)
    assert file.read_bytes() == data and file.name.endswith(".tar.gz")
    first = file.stat().st_mtime_ns
    assert fetch_upload(storage, digest, folder).stat().st_mtime_ns == first
    file.write_bytes(b"damaged")
    assert fetch_upload(storage, digest, folder).read_bytes() == data
    storage.put(f"uploads/{digest}.tar.gz", b"damaged")
    file.unlink()
    with pytest.raises(DatasetError, match="damaged"):
        fetch_upload(storage, digest, folder)
    assert list(folder.iterdir()) == []


def test_path_outside_the_roots_is_refused_by_its_real_place(surroundings: Surroundings, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.zip").write_bytes(packed())
    (surroundings.data_dir / "link.zip").symlink_to(outside / "x.zip")
    for uri in (str(outside / "x.zip"), "../outside/x.zip", "link.zip", f"file://{outside}/x.zip"):
        with pytest.raises(DatasetError, match="outside the folders"):
            load(spec(uri), surroundings.data_access)
    anywhere = surroundings.model_copy(update={"data_roots": None})
    assert load(spec("link.zip"), anywhere.data_access).digest
    assert allowed_path("file:///a%20b", Path("/d"), None) == Path("/a b")
    with pytest.raises(DatasetError, match="names the host"):
        allowed_path("file://host/a", Path("/d"), None)


def test_link_inside_a_folder_may_not_lead_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "set" / "cat", root / "shared", outside):
        folder.mkdir(parents=True)
    (root / "set" / "dog").symlink_to(root / "shared")
    (root / "set" / "cat" / "round").symlink_to(root / "set")
    check_links(root / "set", (root,))
    (root / "shared" / "1.png").symlink_to(outside / "1.png")
    with pytest.raises(DatasetError, match="outside the folders"):
        check_links(root / "set", (root,))
    check_links(root / "set", None)
    check_links(root / "set", (root, outside))


def test_roots_come_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCFM_DATA_ROOTS", "/a, /b/c")
    assert Surroundings().data_roots == (Path("/a"), Path("/b/c"))
    monkeypatch.setenv("NCFM_DATA_ROOTS", "")
    assert Surroundings().data_roots is None
