"""Published data sets in made-up files of their layouts."""

from __future__ import annotations

import hashlib
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from ncfm_core.catalog import DATASETS, dataset_facts
from ncfm_core.datasets import load_dataset
from ncfm_core.errors import DatasetError
from ncfm_core.imagenet import SUBSETS

SMALL = 2**20


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, value: int, size: tuple[int, int] = (70, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(path, "JPEG", quality=95)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_catalog_is_complete_and_consistent() -> None:
    for name, facts in DATASETS.items():
        assert facts.name == name
        assert len(facts.mean) == len(facts.std) == (0 if name == "imagefolder" else facts.channels)
        assert len(facts.class_names) in (0, facts.num_classes)
        assert len(set(facts.class_names)) == len(facts.class_names)
        assert len(facts.wnids) in (0, facts.num_classes)
        assert facts.smallest_class * facts.num_classes <= facts.num_train
        assert facts.files or name in ("digits", "imagefolder")
    assert {facts.image_size: facts.depth for facts in DATASETS.values()} == {8: 2, 28: 3, 32: 3, 64: 4, 128: 5}
    assert set(SUBSETS) <= set(DATASETS)
    assert not dataset_facts("svhn").flip


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("digits", "imagefolder")])
def test_missing_data_are_told_with_files_and_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and dataset_facts(name).files[0] in message and "NCFM_DATA_DIR" in message
    assert caught.value.problems[0].field == "dataset.name"


def test_svhn_is_read_from_its_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    sums = {}
    for part, count in (("train", 30), ("test", 20)):
        file = tmp_path / f"{part}_32x32.mat"
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]  # ten stands for zero
        scipy.io.savemat(file, {"X": pixels(32, 32, 3, count), "y": labels})
        sums[part] = ["", file.name, md5(file)]
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        load_dataset("svhn", data_dir=tmp_path)
    assert [Path(problem.value.strip("'")).name for problem in caught.value.problems] == list(
        f"{part}_32x32.mat" for part in ("train", "test")
    )
    monkeypatch.setattr(SVHN, "split_list", sums)
    svhn = load_dataset("svhn", data_dir=tmp_path)
    assert svhn.train_images.shape == (30, 3, 32, 32)
    assert svhn.class_counts == (3,) * 10
    assert svhn.train_labels[9] == 0
    assert np.array_equal(svhn.test_images[7].permute(1, 2, 0), pixels(32, 32, 3, 20)[..., 7])


def test_cifar100_takes_the_names_of_its_classes_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, count in (("train", 200), ("test", 100)):
        labels = [index % 100 for index in range(count)]
        (folder / part).write_bytes(pickle.dumps({"data": pixels(count, 3072), "fine_labels": labels}))
    names = [f"class {index}" for index in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.raises(DatasetError, match=r"cannot be read: its .* bytes have the md5 sum") as caught:
        load_dataset("cifar100", data_dir=tmp_path)
    assert [problem.value for problem in caught.value.problems] == [
        repr(str(folder / part)) for part in ("train", "test", "meta")
    ]
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    cifar = load_dataset("cifar100", data_dir=tmp_path)
    assert cifar.class_names == tuple(names)
    assert cifar.class_counts == (2,) * 100
    assert np.array_equal(cifar.train_images.flatten(1), pixels(200, 3072))
    whole = (folder / "test").read_bytes()
    (folder / "test").write_bytes(whole[:1000])
    with pytest.raises(DatasetError, match=r"its 1000 bytes have .*cut off, damaged or another file") as caught:
        load_dataset("cifar100", data_dir=tmp_path)
    assert [problem.value for problem in caught.value.problems] == [repr(str(folder / "test"))]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_real_files_have_the_facts_of_the_catalog(name: str) -> None:
    folder = Path(os.environ.get("NCFM_DATA_DIR", "unset"))
    facts = dataset_facts(name)
    if not (folder / facts.files[0]).exists():
        pytest.skip(f"no {name} below NCFM_DATA_DIR")
    dataset = load_dataset(name, data_dir=folder)
    counted = dataset.describe(facts)
    assert (counted.num_train, counted.num_test, counted.num_classes) == (
        facts.num_train,
        facts.num_test,
        facts.num_classes,
    )
    assert (counted.smallest_class, counted.image_size) == (facts.smallest_class, facts.image_size)
    mean = dataset.train_images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor(facts.mean), atol=1e-3, rtol=0)


def tiny(root: Path, *, annotated: bool, classes: int = 3) -> None:
    lines = []
    for label in range(classes):
        wnid = f"n0000000{label}"
        for index in range(2):
            write_image(root / f"train/{wnid}/images/{wnid}_{index}.JPEG", 60 * label, (64, 64))
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("x")
        name = f"val_{classes - label}.JPEG"
        write_image(root / ("val/images" if annotated else f"val/{wnid}") / name, 60 * label, (64, 64))
        lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    if annotated:
        (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n00000000\tgoldfish, Carassius auratus\nn00000002\tking penguin\n")


@pytest.mark.parametrize("annotated", [True, False])
def test_tiny_imagenet_is_read_in_both_layouts(annotated: bool, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny-imagenet-200", annotated=annotated)
    dataset = load_dataset("tiny-imagenet", data_dir=tmp_path)
    assert dataset.train_images.shape == (6, 3, 64, 64)
    assert dataset.class_names == ("n00000000-goldfish", "n00000001", "n00000002-king-penguin")
    assert dataset.test_labels.tolist() == [0, 1, 2]
    red = dataset.test_images[:, 0].float().mean((1, 2))
    torch.testing.assert_close(red, torch.tensor([0.0, 60.0, 120.0]), atol=3, rtol=0)


def test_annotation_of_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    tiny(tmp_path / "tiny-imagenet-200", annotated=True)
    (tmp_path / "tiny-imagenet-200/val/images/val_2.JPEG").unlink()
    with pytest.raises(DatasetError, match=r"line 2 names 'val/?.*val_2|line 2 names 'val_2"):
        load_dataset("tiny-imagenet", data_dir=tmp_path)


@pytest.mark.parametrize("folder", ["imagenet", "imagewoof"])
def test_subset_of_imagenet_is_read_from_its_classes_alone(folder: str, tmp_path: Path) -> None:
    wnids = tuple(SUBSETS["imagewoof"])
    for label, wnid in enumerate(wnids):
        write_image(tmp_path / folder / f"train/{wnid}/a.JPEG", 20 * label)
        write_image(tmp_path / folder / f"val/{wnid}/b.JPEG", 20 * label, (300, 200))
    (tmp_path / folder / "train/n99999999").mkdir()
    (tmp_path / folder / "train/n99999999/broken.JPEG").write_bytes(b"never looked at")
    woof = load_dataset("imagewoof", data_dir=tmp_path)
    assert woof.train_images.shape == (10, 3, 128, 128)
    assert woof.class_names[:2] == ("australian-terrier", "border-terrier")
    red = woof.test_images[:, 0].float().mean((1, 2))
    torch.testing.assert_close(red, 20 * torch.arange(10.0), atol=3, rtol=0)
    (tmp_path / folder / f"val/{wnids[4]}/b.JPEG").unlink()
    with pytest.raises(DatasetError, match=wnids[4]):
        load_dataset("imagewoof", data_dir=tmp_path)


def write_batches(folder: Path, form: str, rows: int = 100) -> np.ndarray:
    folder.mkdir(parents=True)
    everything = pixels(11 * rows, 3 * 64 * 64)
    for number in range(11):
        name = "val_data" if number == 10 else f"train_data_batch_{number + 1}"
        part = everything[number * rows : (number + 1) * rows]
        labels = [(number * rows + index) % 1000 + 1 for index in range(rows)]
        if form == "npz":
            np.savez(folder / f"{name}.npz", data=part, labels=np.array(labels), mean=part.mean(0))
        else:
            document = {"data": part, "labels": labels, "mean": part.mean(0)}
            (folder / name).write_bytes(pickle.dumps(document, protocol=int(form)))
    return everything.reshape(-1, 3, 64, 64)


@pytest.mark.parametrize("form", ["npz", "2", "4", "5"])
def test_downsampled_imagenet_is_read_from_arrays_and_pickles(form: str, tmp_path: Path) -> None:
    everything = write_batches(tmp_path / "imagenet64", form)
    (tmp_path / "imagenet64/map_clsloc.txt").write_text("n02119789 1 kit_fox\nn02100735 2 English_setter\n")
    dataset = load_dataset("imagenet", data_dir=tmp_path)
    assert dataset.num_classes == 1000
    assert dataset.class_names[:3] == ("n02119789-kit-fox", "n02100735-english-setter", "class-0003")
    assert torch.equal(dataset.train_images, torch.from_numpy(everything[:1000]))
    assert torch.equal(dataset.test_images, torch.from_numpy(everything[1000:]))
    assert dataset.train_labels.tolist() == list(range(1000))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def test_pickle_that_names_anything_but_arrays_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path / "imagenet64", "4", rows=2)
    for evil in (Evil(), {"data": Evil(), "labels": [1]}, np.array([Evil()], dtype=object)):
        (tmp_path / "imagenet64/train_data_batch_3").write_bytes(pickle.dumps(evil))
        with pytest.raises(DatasetError, match=r"train_data_batch_3 cannot be read: it names (posix|nt)\.system"):
            load_dataset("imagenet", data_dir=tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"", "Ran out of input"),
        (pickle.dumps([1]), "cannot be read"),
        (pickle.dumps({"data": pixels(2, 7), "labels": [1, 2]}), "rows of 12288 bytes"),
        (pickle.dumps({"data": pixels(2, 12288), "labels": [0, 2]}), "labels run from 0 to 2"),
        (pickle.dumps({"data": pixels(2, 12288), "labels": ["a", "b"]}), "not whole numbers"),
        (pickle.dumps({"data": pixels(2, 12288).astype(np.float32), "labels": [1, 2]}), "rows of 12288 bytes"),
        (pickle.dumps({"data": pixels(3, 12288), "labels": [1, 2]}), "3 images have 2 labels"),
        (pickle.dumps({"data": pixels(2, 12288), "labels": [1, 2]})[:-900], "cannot be read"),
    ],
)
def test_damaged_batch_is_named(document: bytes, says: str, tmp_path: Path) -> None:
    write_batches(tmp_path / "imagenet64", "4", rows=2)
    (tmp_path / "imagenet64/train_data_batch_10").write_bytes(document)
    with pytest.raises(DatasetError, match=says) as caught:
        load_dataset("imagenet", data_dir=tmp_path)
    assert "train_data_batch_10" in str(caught.value)


def test_batch_that_is_missing_is_named(tmp_path: Path) -> None:
    write_batches(tmp_path / "imagenet64", "npz", rows=2)
    (tmp_path / "imagenet64/val_data.npz").unlink()
    with pytest.raises(DatasetError, match="val_data"):
        load_dataset("imagenet", data_dir=tmp_path)


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    write_batches(tmp_path / "imagenet64", "npz", rows=2)
    np.savez(tmp_path / "imagenet64/val_data.npz", data=np.array([Evil()], dtype=object), labels=np.array([1]))
    with pytest.raises(DatasetError, match=r"val_data.npz cannot be read"):
        load_dataset("imagenet", data_dir=tmp_path)


def test_class_without_images_is_told(tmp_path: Path) -> None:
    write_batches(tmp_path / "imagenet64", "npz", rows=50)
    with pytest.raises(DatasetError, match=r"class-0501.*has no training images"):
        load_dataset("imagenet", data_dir=tmp_path)


def test_truncated_archive_of_arrays_is_told(tmp_path: Path) -> None:
    write_batches(tmp_path / "imagenet64", "npz", rows=2)
    file = tmp_path / "imagenet64/train_data_batch_4.npz"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DatasetError, match=r"train_data_batch_4.npz cannot be read"):
        load_dataset("imagenet", data_dir=tmp_path)
    file.write_bytes(zlib.compress(b"x"))
    with pytest.raises(DatasetError, match=r"train_data_batch_4.npz cannot be read"):
        load_dataset("imagenet", data_dir=tmp_path)
