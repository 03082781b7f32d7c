"""A user's own images: layouts, archives, every kind of file, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ncfm_core.datasets import Dataset, decoding, load_dataset, sources
from ncfm_core.datasets.decoding import decode
from ncfm_core.errors import DatasetError
from ncfm_core.spec import DatasetSpec

SIZE = 16


def encoded(
    colour: Any = (10, 20, 30), size: tuple[int, int] = (20, 24), mode: str = "RGB", form: str = "PNG"
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, form)
    return out.getvalue()


def classes(names: tuple[str, ...] = ("cat", "dog", "eel"), count: int = 10, top: str = "") -> dict[str, bytes]:
    """Files of some classes; image i of class c has the red value 20 c + i."""
    return {
        f"{top}{name}/{index:02d}.png": encoded((20 * label + index, 0, 0))
        for label, name in enumerate(names)
        for index in range(count)
    }


def split(names: tuple[str, ...] = ("cat", "dog", "eel"), test: str = "test", top: str = "") -> dict[str, bytes]:
    return classes(names, 4, f"{top}train/") | classes(names, 2, f"{top}{test}/")


def write_folder(files: Mapping[str, bytes], root: Path) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(files: Mapping[str, bytes], path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(files: Mapping[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def load(uri: Path | str, size: int = SIZE, **options: Any) -> Dataset:
    spec = DatasetSpec(name="imagefolder", uri=str(uri), image_size=size)
    return load_dataset(spec, **{"data_dir": Path("unused")} | options)


def refused(uri: Path | str, says: str, **options: Any) -> DatasetError:
    with pytest.raises(DatasetError, match=says) as caught:
        load(uri, **options)
    assert caught.value.problems[0].hint
    return caught.value


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_both_parts_are_the_split(test: str, tmp_path: Path) -> None:
    dataset = load(write_folder(split(test=test), tmp_path))
    assert dataset.class_names == ("cat", "dog", "eel")
    assert (dataset.class_counts, len(dataset.test_labels)) == ((4, 4, 4), 6)
    assert dataset.split == f"by the folders train and {test}"
    assert dataset.train_images.shape == (12, 3, SIZE, SIZE)
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23, 40, 41, 42, 43]


def test_test_comes_before_val_and_what_is_not_used_is_counted(tmp_path: Path) -> None:
    files = split() | {f"val/{name}": data for name, data in classes(("cat", "dog"), 3).items()}
    files |= {"README.md": b"x", "train/notes.txt": b"x", "train/stray.png": encoded(), ".git/a.png": b"x"}
    dataset = load(write_folder(files, tmp_path))
    assert dataset.split == "by the folders train and test"
    assert dataset.ignored_files == 6 + 4


def test_classes_alone_are_split_by_the_names_of_their_files(tmp_path: Path) -> None:
    dataset = load(write_folder(classes(), tmp_path / "one"))
    assert dataset.class_counts == (8, 8, 8)
    assert dataset.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "one image in 5" in dataset.split
    # The content of a file changes nothing about where it goes, and neither does the folder that it lies in.
    other = {name: encoded((200 + label % 50, 0, 0)) for label, name in enumerate(sorted(classes()))}
    again = load(write_folder({f"wrapped/{name}": data for name, data in other.items()}, tmp_path / "two"))
    order = sorted(classes())
    numbers = [order.index(f"{dataset.class_names[v // 20]}/{v % 20:02d}.png") for v in dataset.test_images[:, 0, 0, 0]]
    assert [200 + number % 50 for number in numbers] == again.test_images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("top", ["", "birds/", "./", "a/b/"])
@pytest.mark.parametrize("layout", [classes, split])
def test_folder_and_archives_give_the_same_data(layout: Any, top: str, tmp_path: Path) -> None:
    files = layout(top=top)
    expected = load(write_folder(layout(), tmp_path / "folder")).digest
    backwards = dict(sorted(files.items(), reverse=True))
    assert load(write_folder(files, tmp_path / "again")).digest == expected
    assert load(write_tar(backwards, tmp_path / "a.tar")).digest == expected
    assert load(write_tar(files, tmp_path / "a.tar.gz", "w:gz")).digest == expected
    assert load(write_tar(files, tmp_path / "a.tgz", "w:gz")).digest == expected
    assert load(write_zip(backwards, tmp_path / "A.ZIP")).digest == expected


def test_uri_is_a_path_a_relative_one_or_a_file_uri(tmp_path: Path) -> None:
    folder = write_folder(classes(), tmp_path / "my birds")
    digest = load(folder).digest
    assert load("my birds", data_dir=tmp_path).digest == digest
    assert load(folder.as_uri()).digest == digest
    refused("file://elsewhere/x", "names the host")
    refused(tmp_path / "nothing", "nothing at that path")
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", "neither a folder nor an archive")


def test_names_of_the_classes_are_part_of_what_the_data_are(tmp_path: Path) -> None:
    one = load(write_folder(split(("a", "b")), tmp_path / "one"))
    two = load(write_folder(split(("a", "c")), tmp_path / "two"))
    assert torch.equal(one.train_images, two.train_images)
    assert one.digest != two.digest


def test_statistics_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    dataset = load(write_folder(split(), tmp_path))
    expected = dataset.train_images.double() / 255
    torch.testing.assert_close(dataset.mean.double(), expected.mean((0, 2, 3)), atol=1e-7, rtol=0)
    red = expected[:, 0].std(correction=0)
    torch.testing.assert_close(dataset.std.double(), torch.tensor([red, 1 / 255, 1 / 255]).double(), atol=1e-7, rtol=0)
    assert dataset.normalise(dataset.train_images).isfinite().all()
    facts = dataset.describe(DatasetSpec(name="imagefolder", uri="/x/birds.zip", image_size=SIZE).facts)
    assert (facts.num_classes, facts.num_train, facts.smallest_class, facts.assumed) == (3, 12, 4, False)
    assert facts.title == "birds, 16x16 colour"


def pixel(data: bytes) -> list[int]:
    return [int(value) for value in decode(data, "x", SIZE)[:, SIZE // 2, SIZE // 2]]


def test_every_kind_of_colour_becomes_rgb() -> None:
    assert pixel(encoded(77, mode="L")) == [77, 77, 77]
    assert pixel(encoded(1, mode="1")) == [255, 255, 255]
    assert pixel(encoded((200, 100, 50, 128), mode="RGBA")) == [227, 177, 152]
    assert pixel(encoded((100, 0), mode="LA")) == [255, 255, 255]
    assert pixel(encoded((0, 255, 255, 0), mode="CMYK", form="JPEG"))[0] > 250
    assert pixel(encoded((0, 255, 255, 0), mode="CMYK", form="JPEG"))[1] < 5
    assert pixel(encoded(0x8123, mode="I;16")) == [0x81] * 3
    for form in ("WEBP", "BMP", "GIF", "JPEG", "PNG"):
        assert np.abs(np.array(pixel(encoded((200, 100, 50), form=form))) - [200, 100, 50]).max() <= 4
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    out = io.BytesIO()
    palette.save(out, "PNG")
    assert pixel(out.getvalue()) == [9, 8, 7]
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=1)
    assert pixel(out.getvalue()) == [255, 255, 255]
    out = io.BytesIO()
    palette.save(out, "GIF", save_all=True, append_images=[Image.new("P", (20, 20), 0)])
    assert pixel(out.getvalue()) == [9, 8, 7]


def test_orientation_of_a_camera_is_applied() -> None:
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    decoded = decode(out.getvalue(), "x", SIZE)
    assert decoded[:, 2].max() == 0 and decoded[:, -3].min() == 255


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (1, 301), (8, 8), (16, 16)])
def test_middle_of_the_image_is_scaled_with_antialiasing(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    decoded = decode(out.getvalue(), "x", SIZE)
    width, height = (round(SIZE * each / min(size)) for each in size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(whole, (height, width), mode="bilinear", antialias=True)[0]
    wanted = scaled[:, top : top + SIZE, left : left + SIZE]
    assert (torch.from_numpy(decoded.copy()) - wanted).abs().max() <= (0 if size == (16, 16) else 1.5)


def test_truncated_and_corrupt_files_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        out = io.BytesIO()
        noise.save(out, form)
        data = out.getvalue()
        for bad, says in (
            (b"", "the file is empty"),
            (data[:10], ""),
            (data[: len(data) // 2], ""),
            (b"\0" * 100, "its 100 bytes are not a PNG, JPEG, WebP, BMP or GIF"),
            (b"<svg></svg>", "its 11 bytes are not a PNG, JPEG, WebP, BMP or GIF"),
        ):
            folder = write_folder(classes() | {"dog/bad one.png": bad}, tmp_path / "folder")
            problem = refused(folder, f"the image cannot be read: {says}").problems[0]
            assert problem.value == "'dog/bad one.png'"
            assert " at 0x" not in problem.message


def test_damaged_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        data = encoded(form=form)
        for _ in range(150):
            bad = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, len(bad), 3):
                bad[place] = rng.integers(0, 256)
            try:
                assert decode(bytes(bad), "x", SIZE).shape == (3, SIZE, SIZE)
            except DatasetError:
                pass


def test_image_that_decodes_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    with pytest.raises(DatasetError):
        decode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0" * 20, "bomb.png", SIZE)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    with pytest.raises(DatasetError, match="20x24 pixels are more than 100"):
        decode(encoded(), "x", SIZE)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    refused(write_folder(classes(), tmp_path), "more than 0 MiB")
    refused(write_zip(classes(), tmp_path / "a.zip"), "more than 0 MiB")
    refused(write_tar(classes(), tmp_path / "a.tar"), "more than 0 MiB")
    monkeypatch.setattr(sources, "MAX_TOTAL_BYTES", 1000)
    refused(tmp_path / "a.zip", "unpacks to more than")
    refused(tmp_path / "a.tar", "unpacks to more than")
    monkeypatch.setattr(sources, "MAX_FILES", 10)
    refused(tmp_path / "a.tar", "more than 10 files")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no images in 0 files"),
        ({"a/x.txt": b"x"}, "no images in 1 files"),
        ({"x.png": encoded(), "y.png": encoded()}, "no class folders"),
        (classes(("only",)), "only one class: 'only'"),
        ({f"data/{name}": data for name, data in classes(("only",)).items()}, "only one class"),
        (classes() | {"fox/readme.txt": b"x"}, "class 'fox' has no images"),
        (classes() | {"fox/a.png": encoded()}, "class 'fox' has a single image"),
        (split() | {"train/fox/readme.txt": b"x"}, "class 'fox' below train has no images"),
        (split() | {"test/fox/a.png": encoded()}, "class 'fox' is in test but not in train"),
        (split() | {"train/fox/a.png": encoded()}, "class 'fox' below test has no images"),
        ({f"test/{name}": data for name, data in classes().items()}, "a folder test but none named train"),
        (classes(("a" * 101, "b")), "has a name that cannot be published"),
        (classes(("a\nb", "b")), "has a name that cannot be published"),
    ],
)
def test_what_is_not_classes_of_images_is_told(files: dict[str, bytes], says: str, tmp_path: Path) -> None:
    refused(write_folder(files, tmp_path / "folder") if files else tmp_path, says)
    refused(write_tar(files, tmp_path / "a.tar"), says)


def test_empty_folder_is_an_empty_class_but_a_hidden_one_is_not(tmp_path: Path) -> None:
    write_folder(classes(), tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert load(tmp_path).num_classes == 3
    (tmp_path / "fox").mkdir()
    refused(tmp_path, "class 'fox' has no images")


def test_train_alone_is_split_like_classes_alone(tmp_path: Path) -> None:
    whole = load(write_folder(classes(), tmp_path / "a"))
    train = load(write_folder({f"train/{name}": data for name, data in classes().items()}, tmp_path / "b"))
    assert train.digest == whole.digest


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "a\\..\\x.png", "C:/x.png", "..", "a/../b.png"]
)
def test_members_that_lead_out_of_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    files = classes() | {name: encoded()}
    refused(write_tar(files, tmp_path / "a.tar"), "leads out of its folder")
    refused(write_zip(files, tmp_path / "a.zip"), "leads out of its folder")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_archives_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = write_tar(classes(), tmp_path / "a.tar")
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("cat/link.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    refused(path, "is a link or a device")
    path = write_zip(classes(), tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as packed:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
    refused(path, "is a link or a device")


def test_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(classes(), tmp_path / "a.tar")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("./cat/00.png"))
    refused(path, "stands in it twice")


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    for path in (
        write_tar(classes(), tmp_path / "a.tar"),
        write_tar(classes(), tmp_path / "a.tar.gz", "w:gz"),
        write_zip(classes(), tmp_path / "a.zip"),
    ):
        data = path.read_bytes()
        for bad in (b"", b"junk" * 300, data[: len(data) // 2 + 7], data[:100]):
            path.write_bytes(bad)
            refused(path, "cannot be read|no images")


def test_zip_with_a_wrong_sum_or_a_password_is_told(tmp_path: Path) -> None:
    path = write_zip(classes(), tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    central = data.find(b"PK\1\2")
    data[central + 16] ^= 1
    path.write_bytes(data)
    assert "cat/00.png" in str(refused(path, "cannot be read"))
    data[central + 16] ^= 1
    data[6] |= 1
    data[central + 8] |= 1
    path.write_bytes(data)
    refused(path, "cannot be read.*password")


def test_links_in_a_folder_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    write_folder(classes(("cat", "dog")), tmp_path / "real")
    root = tmp_path / "linked"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/dog/again").symlink_to(tmp_path / "real/dog")
    assert load(root).class_counts == (8, 8)
    (root / "cat/gone.png").symlink_to(tmp_path / "nowhere")
    refused(root, "a link to nothing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    write_folder(classes(), tmp_path)
    os.mkfifo(tmp_path / "cat/pipe.png")
    refused(tmp_path, "neither a file nor a folder")
