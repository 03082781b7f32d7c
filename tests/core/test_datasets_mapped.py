"""Sets larger than the memory bound: the same numbers from a mapped file, and nothing of them copied."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ncfm_core.coresets import random_real
from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.datasets.pixels import statistics
from ncfm_core.distill import Distillation
from ncfm_core.errors import DatasetError
from ncfm_core.evaluate import evaluate
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.rng import generator
from ncfm_core.spec import DatasetSpec, JobSpec
from ncfm_core.submission import resolve

CPU = torch.device("cpu")
IMAGENET_IMAGES = 1_281_167


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 30, 24 and 27 images of noise, each class around a brightness of its own."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, count in enumerate((30, 24, 27)):
        (root / f"class{label}").mkdir()
        for index in range(count):
            pixels = rng.integers(60 * label, 60 * label + 120, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}/{index:03d}.png")
    return root


def load(folder: Path, cache_dir: Path | None = None, memory_bytes: int = 2**30) -> Dataset:
    spec = DatasetSpec(name="imagefolder", uri=str(folder), image_size=8)
    return load_dataset(spec, data_dir=Path("unused"), cache_dir=cache_dir, memory_bytes=memory_bytes)


@pytest.fixture(scope="session")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """The same data in memory and mapped."""
    mapped = load(folder, tmp_path_factory.mktemp("cache"), 1000)
    assert mapped.train_file is not None and mapped.test_file is not None
    return load(folder), mapped


def test_mapped_set_has_the_same_content(pair: tuple[Dataset, Dataset]) -> None:
    memory, mapped = pair
    assert memory.train_file is None
    assert mapped.digest == memory.digest
    assert mapped.class_counts == memory.class_counts == (24, 20, 22)
    assert torch.equal(mapped.mean, memory.mean) and torch.equal(mapped.std, memory.std)
    chosen = mapped.class_batches(5, generator(0, "test")).flatten()
    assert torch.equal(mapped.take(chosen), memory.train_images[chosen])
    assert torch.equal(mapped.test[3:9], memory.test_images[3:9])


def test_hold_out_of_a_mapped_set_is_a_choice_of_rows(pair: tuple[Dataset, Dataset]) -> None:
    memory, mapped = (each.hold_out(0.25, seed=3) for each in pair)
    assert mapped.digest == memory.digest
    assert mapped.train_images.data_ptr() == pair[1].train_images.data_ptr() == mapped.test_images.data_ptr()
    memory, mapped = (each.hold_out(0.5, seed=1) for each in (memory, mapped))
    assert mapped.digest == memory.digest
    chosen = torch.tensor([4, 0, 2])
    assert torch.equal(mapped.take(chosen), memory.take(chosen))
    assert torch.equal(mapped.test[1:4], memory.test_images[1:4])


def test_mapped_set_travels_as_its_path(pair: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    mapped = pair[1].hold_out(0.25, seed=3)
    digest = mapped.digest
    data = pickle.dumps(mapped)
    assert len(data) < 8000
    again: Dataset = pickle.loads(data)
    del again.__dict__["digest"]
    assert again.digest == digest
    assert mapped.train_file is not None
    shutil.copytree(mapped.train_file.parent, tmp_path / "copy")
    shutil.move(mapped.train_file, tmp_path / "away")
    try:
        with pytest.raises(DatasetError, match=r"is not there.*Every node must see the cache folder"):
            pickle.loads(data)
    finally:
        shutil.move(tmp_path / "away", mapped.train_file)


def test_conversion_is_done_once_and_again_when_a_file_changes(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    cache = tmp_path / "cache"
    first = load(images, cache, 1000)
    (made,) = cache.iterdir()
    before = made.stat().st_mtime_ns
    assert load(images, cache, 1000).train_file == first.train_file
    assert [path.name for path in cache.iterdir()] == [made.name]
    assert made.stat().st_mtime_ns == before
    os.utime(images / "class0/000.png", ns=(1, 1))
    other = load(images, cache, 1000)
    assert other.train_file != first.train_file
    assert other.digest == first.digest


def test_damaged_cache_is_told(folder: Path, tmp_path: Path) -> None:
    made = load(folder, tmp_path, 1000)
    assert made.train_file is not None
    size = made.train_file.stat().st_size
    os.truncate(made.train_file, size - 1)
    with pytest.raises(DatasetError, match=f"has {size - 1} bytes instead of {size}.*Delete"):
        load(folder, tmp_path, 1000)
    (made.train_file.parent / "set.json").write_text("{")
    with pytest.raises(DatasetError, match=r"is damaged.*Delete it"):
        load(folder, tmp_path, 1000)


def test_large_set_without_a_place_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="NCFM_CACHE_DIR"):
        load(folder, None, 1000)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="NCFM_CACHE_DIR"):
        load(folder, tmp_path / "file", 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DatasetError, match="GiB are free"):
        load(folder, tmp_path / "cache", 1000)


def test_broken_conversion_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/class1/003.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=r"class1/003.png"):
        load(tmp_path / "images", tmp_path / "cache", 1000)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture(scope="session")
def job(folder: Path) -> JobSpec:
    return resolve(
        {
            "dataset": {"name": "imagefolder", "uri": str(folder), "image_size": 8},
            "ipc": 2,
            "preset": "quick",
            "model": {"width": 8},
            "teachers": {"count": 1, "training": {"epochs": 2, "batch_size": 16}},
            "method": {"steps": 4, "reuse": 2, "num_frequencies": 16, "num_components": 4, "real_batch": 8},
            "evaluate": [{"students": 1, "tests": 1, "training": {"epochs": 2, "batch_size": 16}}],
        }
    )


def test_every_number_is_the_same_from_a_mapped_set(pair: tuple[Dataset, Dataset], job: JobSpec) -> None:
    found: list[list[Any]] = []
    for dataset in pair:
        teacher = TeacherTraining(dataset, job.model, job.teachers.training, seed=0, index=0, device=CPU)
        for _ in teacher.run():
            pass
        pool = TeacherPool(job.model, dataset, [teacher.result()], CPU)
        distillation = Distillation(dataset, pool, job.method, ipc=job.ipc, seed=0, device=CPU)
        for _ in distillation.run():
            pass
        entry = job.evaluate[0]
        options: dict[str, Any] = {"model": entry.model, "training": entry.training, "students": 1, "tests": 1}
        steps = evaluate(dataset.train, dataset.train_labels, dataset, seed=0, device=CPU, **options)
        accuracies = [progress.metrics["accuracy"] for progress in steps]
        images, labels = random_real(dataset, ipc=3, seed=0)
        found.append([teacher.accuracy(), distillation.synthetic.images, accuracies, images, labels])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_thousand_classes_are_drawn_from_quickly() -> None:
    labels = torch.arange(1000).repeat_interleave(1300)
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(len(labels), 1, 1, 1)
    names = tuple(map(str, range(1000)))
    dataset = Dataset("many", images, labels, images[:1], labels[:1], names, torch.zeros(1), torch.ones(1))
    assert dataset.members.shape == (1000, 1300)
    chosen = dataset.class_batches(64, generator(0, "test"))
    assert torch.equal(labels[chosen], torch.arange(1000)[:, None].expand(1000, 64))


def test_floats_become_bytes_and_bad_ones_are_refused() -> None:
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1])

    def make(train: torch.Tensor, labels: torch.Tensor = labels, names: tuple[str, ...] = ("a", "b")) -> Dataset:
        return Dataset.from_tensors("own", train=(train, labels), test=(images, labels), class_names=names)

    dataset = make(images)
    assert torch.equal(dataset.train_images, images.mul(255).round().to(torch.uint8))
    torch.testing.assert_close(dataset.mean, dataset.train_images.double().mean((0, 2, 3)).float() / 255)
    for bad, says in (
        (images.clone().index_fill_(0, torch.tensor(2), torch.nan), "48 pixels are NaN or infinite"),
        (images / 0, "NaN or infinite"),
        (images * 255, "not in .0, 1."),
        (images - 1, "not in .0, 1."),
        (images.to(torch.int32), "neither uint8 nor float"),
        (images[0], "must be uint8 of shape"),
        (images[:5], "5 training images have 6 labels"),
    ):
        with pytest.raises(DatasetError, match=says):
            make(bad)
    for labels_, names, says in (
        (labels + 1, ("a", "b"), "labels run from 1 to 2"),
        (labels, ("a",), "nothing to tell apart"),
        (labels, ("a", "b", "c"), "class 'c' has no training images"),
    ):
        with pytest.raises(DatasetError, match=says):
            make(images, labels_, names)
    assert make(images).digest != make(images, names=("a", "c")).digest
    with pytest.raises(DatasetError, match="must be uint8"):
        Dataset("own", images, labels, images, labels, ("a", "b"), dataset.mean, dataset.std)


def test_statistics_are_exact_over_chunks() -> None:
    images = torch.randint(0, 256, (3000, 2, 3, 3), dtype=torch.uint8, generator=generator(0, "test"))
    mean, std = statistics(images)
    values = images.double() / 255
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(std.double(), values.std((0, 2, 3), correction=0), atol=1e-7, rtol=0)


SCALE = """
import sys, time
from pathlib import Path
import numpy as np, torch
from ncfm_core.datasets import converted, dataset, pixels
from ncfm_core.rng import generator

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20

def clock(what, started):
    print(f"{what}: {time.monotonic() - started:.1f} s, RssAnon {resident('RssAnon'):.2f} GiB", flush=True)

count, folder = int(sys.argv[1]), Path(sys.argv[2])
labels = np.arange(count) * 1000 // count
peak = 0.0

def fill(train, test):
    global peak
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, (1024, 3, 64, 64), dtype=np.uint8)
    for array in (train, test):
        for start in range(0, len(array), 1024):
            array[start : start + 1024] = block[: len(array) - start]
            peak = max(peak, resident("RssAnon"))

started = time.monotonic()
made = converted.convert(converted.Space(4 << 30, folder), name="imagenet", listing="made up", image_shape=(3, 64, 64),
    labels=lambda: (labels.astype(np.int64), np.arange(50_000) % 1000), fill=fill)
clock("converted", started)
data = dataset.Dataset("imagenet", made.train_images, made.train_labels, made.test_images, made.test_labels,
    tuple(map(str, range(1000))), torch.zeros(3), torch.ones(3), train_file=made.train_file, test_file=made.test_file)
data.check_labels()
for step in range(3):
    started = time.monotonic()
    chosen = data.class_batches(64, generator(0, "test", step)).flatten()
    drawn = time.monotonic() - started
    sums = 0
    for part in chosen.split(4096):
        sums += int(data.take(part)[:, 0, 0, 0].sum())
        peak = max(peak, resident("RssAnon"))
    clock(f"drew {len(chosen)} images in {drawn:.2f} s and took them", started)
started = time.monotonic()
split = data.hold_out(0.2, seed=0)
peak = max(peak, resident("RssAnon"))
clock("held out", started)
started = time.monotonic()
print(split.digest if count < 10_000 else data.digest)
clock("digest", started)
peak = max(peak, resident("RssAnon"))
print(f"peak RssAnon {peak:.3f} GiB, VmHWM {resident('VmHWM'):.2f} GiB with the pages of the file")
"""


def run_scale(count: int, folder: Path) -> float:
    """Peak of the memory that is the process's own, in GiB, in a process that does nothing else."""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCALE, str(count), str(folder)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    return float(done.stdout.rpartition("peak RssAnon ")[2].split()[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_imagenet_at_64_pixels_needs_little_memory(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 25 << 30:
        pytest.skip("needs 25 GiB of disk")
    try:
        assert run_scale(IMAGENET_IMAGES, tmp_path / "cache") < 3
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
