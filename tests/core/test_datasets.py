from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ncfm_core.catalog import DATASETS
from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.errors import DatasetError, SpecError
from ncfm_core.rng import generator

RAW = "FashionMNIST/raw"
DIGITS_DIGEST = "sha256:8f1e678c9573806b8eaab681571adba3f115a66aecff4006750786675d5c366c"


def test_digits_are_the_named_split(digits: Dataset) -> None:
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.digest == DIGITS_DIGEST
    assert min(digits.class_counts) == DATASETS["digits"].smallest_class


def test_catalog_statistics_are_those_of_the_images(digits: Dataset) -> None:
    pixels = digits.train_images.to(torch.float64) / 255
    assert pixels.mean().item() == pytest.approx(digits.mean.item(), abs=1e-4)
    assert pixels.std().item() == pytest.approx(digits.std.item(), abs=1e-3)
    normal = digits.normalise(digits.train_images)
    assert normal.mean().abs() < 1e-3
    assert torch.equal(normal, digits.normalise(digits.train_images))
    torch.testing.assert_close(normal, digits.normalise(digits.train_images.float() / 255), atol=1e-5, rtol=1e-5)


def test_class_batches_are_of_their_class_without_repeats(digits: Dataset) -> None:
    chosen = digits.class_batches(100, generator(0, "test"))
    assert chosen.shape == (10, 100)
    for label, row in enumerate(chosen):
        assert (digits.train_labels[row] == label).all()
        assert len(row.unique()) == 100


def test_class_batches_cover_the_whole_class_over_time(digits: Dataset) -> None:
    seen = torch.cat([digits.class_batches(64, generator(0, "test", step)).flatten() for step in range(40)])
    assert len(seen.unique()) == len(digits.train_labels)


def test_hold_out_splits_the_training_data_and_forgets_the_test_set(digits: Dataset) -> None:
    split = digits.hold_out(0.2, seed=0)
    assert len(split.train_labels) + len(split.test_labels) == len(digits.train_labels)
    together = torch.cat([split.train_images, split.test_images]).flatten(1)
    assert {bytes(image) for image in together.numpy()} == {
        bytes(image) for image in digits.train_images.flatten(1).numpy()
    }
    assert split.test_labels.bincount().tolist() == [round(0.2 * count) for count in digits.class_counts]
    assert split.digest != digits.digest
    assert split.digest == digits.hold_out(0.2, seed=0).digest != digits.hold_out(0.2, seed=1).digest


def test_missing_files_are_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset("cifar10", data_dir=tmp_path / "nowhere")
    message = str(caught.value)
    assert "cifar-10-batches-py/data_batch_1" in message
    assert str(tmp_path / "nowhere") in message
    assert "NCFM_DATA_DIR" in message and "NCFM_ALLOW_DOWNLOAD" in message


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Did you mean 'cifar10'"):
        load_dataset("cifar-10", data_dir=tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_torchvision_layout_is_read_as_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"FashionMNIST/raw/{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"FashionMNIST/raw/{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    dataset = load_dataset("fashion-mnist", data_dir=tmp_path)
    assert dataset.train_images.shape == (30, 1, 28, 28)
    assert dataset.train_images.dtype == torch.uint8
    assert np.array_equal(dataset.test_images[:, 0].numpy(), images)
    assert dataset.class_counts == (3,) * 10


def write_fashion(root: Path, *, zipped: bool = False) -> None:
    """30 and 20 images of noise, three and two of each class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        write_idx(root / f"{RAW}/{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(root / f"{RAW}/{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    for path in [*(root / RAW).iterdir()] if zipped else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def test_compressed_files_alone_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    write_fashion(tmp_path / "plain")
    write_fashion(tmp_path / "zipped", zipped=True)
    names = sorted(path.name for path in (tmp_path / "zipped" / RAW).iterdir())
    assert len(names) == 4 and all(name.endswith("-ubyte.gz") for name in names)
    plain, zipped = (load_dataset("fashion-mnist", data_dir=tmp_path / each) for each in ("plain", "zipped"))
    assert zipped.digest == plain.digest
    assert sorted(path.name for path in (tmp_path / "zipped" / RAW).iterdir()) == names
    shutil.move(tmp_path / "zipped" / "FashionMNIST", tmp_path / "zipped" / "MNIST")
    assert torch.equal(load_dataset("mnist", data_dir=tmp_path / "zipped").train_images, plain.train_images)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:1000], "promises 30x28x28 = 23520 bytes, and 984 follow"),
        ("train-images-idx3-ubyte", lambda data: data + b"x", "promises 30x28x28 = 23520 bytes, and more follow"),
        ("t10k-labels-idx1-ubyte", lambda data: data[:7], "it ends in its header, after 7 bytes"),
        ("t10k-labels-idx1-ubyte", lambda _: b"", "it ends in its header, after 0 bytes"),
        ("t10k-images-idx3-ubyte", lambda _: b"not an idx file at all", "does not begin like an IDX file"),
        ("train-labels-idx1-ubyte", lambda data: data[:4] + b"\xff" * 4, "promises 4294967295"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_file_is_named_with_what_is_wrong(
    file: str, change: Callable[[bytes], bytes], says: str, zipped: bool, tmp_path: Path
) -> None:
    write_fashion(tmp_path)
    path = tmp_path / RAW / file
    bad = change(path.read_bytes())
    path.write_bytes(bad)
    if zipped:
        path.unlink()
        path = path.with_name(f"{file}.gz")
        path.write_bytes(gzip.compress(bad))
    with pytest.raises(DatasetError, match=says) as caught:
        load_dataset("fashion-mnist", data_dir=tmp_path)
    assert caught.value.problems[0].value == repr(str(path))
    assert "fetch it again" in caught.value.problems[0].hint


def test_damaged_compression_is_told(tmp_path: Path) -> None:
    write_fashion(tmp_path, zipped=True)
    path = tmp_path / RAW / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    for bad in (data[:500], b"", b"no gzip at all", data[:200] + b"\0" * 100 + data[300:]):
        path.write_bytes(bad)
        with pytest.raises(DatasetError, match="cannot be read") as caught:
            load_dataset("fashion-mnist", data_dir=tmp_path)
        assert caught.value.problems[0].value == repr(str(path))


def test_damaged_files_are_told(tmp_path: Path) -> None:
    for file in DATASETS["fashion-mnist"].files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not an idx file")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset("fashion-mnist", data_dir=tmp_path)
