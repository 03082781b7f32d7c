from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from ncfm_core.catalog import DATASETS
from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.errors import DatasetError, SpecError
from ncfm_core.rng import generator

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


def test_damaged_files_are_told(tmp_path: Path) -> None:
    for file in DATASETS["fashion-mnist"].files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not an idx file")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset("fashion-mnist", data_dir=tmp_path)
