"""The exported set, opened as its users would: without this package."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

from ncfm_core import augment
from ncfm_core.catalog import dataset_facts
from ncfm_core.datasets import load_dataset
from ncfm_core.errors import StorageError
from ncfm_core.models import build_model
from ncfm_core.networks import NETWORKS
from ncfm_core.rng import generator
from ncfm_core.spec import AugmentSpec
from ncfm_core.submission import resolve
from ncfm_core.synthetic import SyntheticSet, start
from worker.export import class_folders, data_card, export_files, load_export
from worker.recipe import training_script

FACTS = dataset_facts("digits")


@pytest.fixture(scope="module")
def synthetic() -> SyntheticSet:
    digits = load_dataset("digits", data_dir=Path("unused"))
    return start(digits, ipc=2, factor=2, init="tiled", draw=generator(0, "init"))


def exported(synthetic: SyntheticSet) -> dict[str, bytes]:
    entry = resolve({"dataset": "digits", "ipc": 2, "evaluate": [{"training": {"epochs": 2}}]}).evaluate[0]
    card = data_card(synthetic, FACTS, seed=0, rows="| this set | 1 |", recipe=training_script(FACTS, entry))
    return export_files(synthetic, FACTS, {"seed": 0}, card)


@pytest.fixture(scope="module")
def folder(synthetic: SyntheticSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for name, data in exported(synthetic).items():
        (folder / name).write_bytes(data)
    return folder


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def test_the_same_set_gives_the_same_bytes(synthetic: SyntheticSet) -> None:
    assert exported(synthetic) == exported(synthetic)


def test_set_comes_back_as_it_was_stored(synthetic: SyntheticSet) -> None:
    again = load_export(exported(synthetic))
    assert torch.equal(again.images, synthetic.images)
    assert torch.equal(again.labels, synthetic.labels)
    assert again.factor == synthetic.factor


def test_missing_file_is_named() -> None:
    with pytest.raises(StorageError, match=r"images\.safetensors"):
        load_export({})


def test_cards_loading_snippet_decodes_in_ten_lines(
    folder: Path, synthetic: SyntheticSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    loading = snippets(folder)[0]
    assert len([line for line in loading.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(loading, names)
    images, labels = synthetic.decode()
    ours = sorted((label, image.sum().item()) for label, image in zip(labels.tolist(), images, strict=True))
    theirs = sorted(
        (label, image.sum().item()) for label, image in zip(names["labels"].tolist(), names["images"], strict=True)
    )
    assert [each[0] for each in ours] == [each[0] for each in theirs]
    assert [each[1] for each in theirs] == pytest.approx([each[1] for each in ours], rel=1e-4)


def test_cards_training_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for snippet in snippets(folder):
        exec(snippet, names)
    assert names["model"](names["images"][:3]).shape == (3, 10)


@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist", "cifar10"])
def test_training_snippet_builds_the_networks_of_the_data_set(dataset: str) -> None:
    facts = dataset_facts(dataset)
    entry = resolve({"dataset": dataset, "ipc": 1, "evaluate": [{"training": {"epochs": 1}}]}).evaluate[0]
    size = (10, facts.channels, facts.image_size, facts.image_size)
    names: dict[str, Any] = {"torch": torch, "images": torch.rand(size), "labels": torch.arange(10)}
    exec(training_script(facts, entry), names)
    assert names["model"](names["images"]).shape == (10, 10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_training_snippet_builds_every_network(name: str, norm: str) -> None:
    facts = dataset_facts("fashion-mnist")
    evaluation: Any = {"model": {"name": name, "norm": norm, "width": 4}, "training": {"epochs": 1}}
    entry = resolve({"dataset": "fashion-mnist", "ipc": 1, "evaluate": [evaluation]}).evaluate[0]
    names: dict[str, Any] = {"torch": torch, "images": torch.rand(10, 1, 28, 28), "labels": torch.arange(10)}
    exec(training_script(facts, entry), names)
    ours = build_model(entry.model, image_shape=(1, 28, 28), num_classes=10, draw=generator(0, "init"))
    # The same layers in the same order, up to the order of what a residual block holds.
    theirs = names["model"]
    sizes = sorted(tuple(each.shape) for each in ours.parameters())
    assert sorted(tuple(each.shape) for each in theirs.parameters()) == sizes
    if not name.startswith("resnet"):
        order = [f"{part}.{i}." for i in range(8) for part in ("convs", "norms")] + ["classifier."]
        state = ours.state_dict()
        keys = [key for prefix in order for key in state if key.startswith(prefix)]
        renamed = dict(zip(theirs.state_dict(), (state[key] for key in keys), strict=True))
        theirs.load_state_dict(renamed)
        torch.testing.assert_close(theirs.eval()(names["images"]), ours.eval()(names["images"]))


@pytest.mark.parametrize("protocol", ["dc", "ncfm", "ddranking"])
def test_training_snippet_follows_the_protocol(protocol: str) -> None:
    evaluate: Any = [{"protocol": protocol, "training": {"epochs": 4, "milestones": [0.5], "cutmix": 0.0}}]
    entry = resolve({"dataset": "cifar10", "ipc": 1, "model": {"width": 4}, "evaluate": evaluate}).evaluate[0]
    names: dict[str, Any] = {"torch": torch, "images": torch.rand(10, 3, 32, 32), "labels": torch.arange(10)}
    script = training_script(dataset_facts("cifar10"), entry)
    exec(script, names)
    assert ("optimizer.state.clear()" in script) is (protocol == "dc")
    assert ("cutout" in script) is (protocol != "ncfm")
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(entry.training.lr * entry.training.gamma)


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_of_the_snippet_are_ours(name: str) -> None:
    """Mean and spread of every pixel over many draws, which are not the same ones."""
    spec = AugmentSpec(policy="single", ops=(name,))  # type: ignore[arg-type]
    entry = resolve({"dataset": "cifar10", "ipc": 1}).evaluate[0]
    training = entry.training.model_copy(update={"augment": spec, "epochs": 1})
    small = entry.model.model_copy(update={"width": 4})
    script = training_script(dataset_facts("cifar10"), entry.model_copy(update={"training": training, "model": small}))
    names: dict[str, Any] = {"torch": torch, "images": torch.rand(2, 3, 32, 32), "labels": torch.arange(2)}
    exec(script, names)
    image = torch.nn.functional.interpolate(
        torch.randn(1, 3, 4, 4, generator=generator(0, "image")), 32, mode="bilinear"
    )
    batch = image.expand(1500, 3, 32, 32)
    ours = augment.draw(spec, generator(0, "draw"), 1500)(batch)
    torch.manual_seed(0)
    theirs = names["augment"](batch)
    torch.testing.assert_close(theirs.mean(0), ours.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(theirs.std(0), ours.std(0), atol=0.15, rtol=0)


def test_opens_as_image_folder(folder: Path, tmp_path: Path, synthetic: SyntheticSet) -> None:
    zipfile.ZipFile(folder / "imagefolder.zip").extractall(tmp_path)
    opened = ImageFolder(str(tmp_path / "train"))
    assert len(opened) == 80
    assert opened.targets == synthetic.decode()[1].tolist()


def test_opens_as_parquet(folder: Path, tmp_path: Path, synthetic: SyntheticSet) -> None:
    opened = datasets.load_dataset(
        "parquet", data_files=str(folder / "train.parquet"), cache_dir=str(tmp_path), split="train"
    )
    assert opened.features["label"].names == list(FACTS.class_names)
    assert opened["label"][:] == synthetic.decode()[1].tolist()
    assert opened[0]["image"].size == (8, 8)


def test_png_pixels_are_the_rounded_images(folder: Path, synthetic: SyntheticSet) -> None:
    import numpy as np
    from PIL import Image

    archive = zipfile.ZipFile(folder / "imagefolder.zip")
    image = np.asarray(Image.open(io.BytesIO(archive.read("train/0/000000.png"))))
    assert np.array_equal(image, (synthetic.decode()[0][0, 0] * 255).round().byte().numpy())


def test_manifest_says_how_to_decode(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["decode"]["factor"] == 2
    assert manifest["images"]["shape"] == [20, 1, 8, 8]
    assert manifest["classes"] == list(FACTS.class_names)
    assert load_file(folder / "images.safetensors")["images"].shape == (20, 1, 8, 8)


def test_class_folders_sort_as_the_labels_do() -> None:
    for name in ("digits", "fashion-mnist", "cifar10"):
        folders = class_folders(dataset_facts(name).class_names)
        assert sorted(folders) == list(folders)


@pytest.mark.parametrize("loss", ["l1_logits", "soft_cross_entropy", "kl"])
def test_soft_labels_are_exported_and_the_cards_snippets_train_on_them(
    loss: str, synthetic: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = synthetic.decode()
    # A label that tells the image it belongs to: the snippet must give each tile its own.
    soft = torch.stack([images.mean((1, 2, 3)), labels.float(), *([torch.zeros(len(labels))] * 8)], 1)
    training: Any = {"epochs": 2, "loss": loss, "cutmix": 0.0}
    submission: Any = {
        "dataset": "digits",
        "ipc": 2,
        "method": {"labels": "soft"},
        "evaluate": [{"training": training}],
    }
    recipe = training_script(FACTS, resolve(submission).evaluate[0])
    with_soft = replace(synthetic, soft_labels=soft)
    card = data_card(with_soft, FACTS, seed=0, rows="| this set | 1 |", recipe=recipe)
    files = export_files(with_soft, FACTS, {"seed": 0}, card)
    again = load_export(files)
    assert again.soft_labels is not None and torch.equal(again.soft_labels, soft)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in snippets(tmp_path):
        exec(snippet, names)
    torch.testing.assert_close(names["soft_labels"][:, 0], names["images"].mean((1, 2, 3)), atol=1e-5, rtol=0)
    assert names["soft_labels"][:, 1].long().tolist() == names["labels"].tolist()
    assert names["loss"].isfinite()
