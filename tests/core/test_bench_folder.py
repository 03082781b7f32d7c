"""What a run leaves on disk between two calls: that it fits, that it comes back, and that a kill or damage is survived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ncfm_core.bench.folder import FILE_BYTES, MIB, Folder, shards
from ncfm_core.bench.keeping import CHOICES, Content, Keeping, choose_keeping, restored
from ncfm_core.bench.pipeline import GOING, TEACHERS
from ncfm_core.errors import CheckpointError, ResourcesError

NETWORK = {"cifar10": 320_010, "cifar100": 504_420}
"""Values of a ConvNet-3 of width 128."""


def content(dataset: str, ipc: int, seeds: int = 1) -> Content:
    classes = 10 if dataset == "cifar10" else 100
    return Content(
        teachers=20,
        network=NETWORK[dataset],
        images=classes * ipc * 3072,
        soft_labels=0,
        sampler=64 * 2048,
        seeds=seeds,
    )


@pytest.mark.parametrize("dataset", NETWORK)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_run_of_cifar_fits_the_folder_to_the_byte(dataset: str, ipc: int, tmp_path: Path) -> None:
    kept = content(dataset, ipc)
    keeping = choose_keeping(kept, 64 * MIB)
    images = torch.rand(kept.images // 3072, 3, 32, 32)
    state = {"images": images, "optimizer.0.step": torch.tensor(3.0), "step": torch.tensor(3)}
    state |= {f"optimizer.0.{name}": torch.rand_like(images) for name in ("exp_avg", "exp_avg_sq")}
    state |= {f"sampler.{name}": torch.rand(64, 2048) for name in ("log_scales", "optimizer.0.a", "optimizer.0.b")}
    teachers = keeping.keep_teacher({str(index): torch.rand(kept.network) for index in range(20)})
    folder = Folder(tmp_path)
    folder.save({}, {TEACHERS: teachers, GOING: keeping.keep_distillation(state)})

    sizes = Folder(tmp_path).sizes()
    assert set(sizes) == {path.name for path in tmp_path.iterdir()}
    assert max(sizes.values()) <= 16 * MIB and sum(sizes.values()) <= 64 * MIB and len(sizes) <= 8
    tensors = sum(sizes.values()) - sizes["run.json"]
    assert tensors - keeping.peak_bytes(kept) < 0.1 * MIB
    assert tensors >= keeping.peak_bytes(kept) or ipc == 1, "with so few images the last teacher takes more"
    back = restored(Folder(tmp_path).load(GOING))
    assert (back["images"] - images).abs().max() <= (0 if keeping.images == "float32" else 1e-5)
    assert keeping.is_exact == (dataset == "cifar10" or ipc == 1)
    if keeping.is_exact:
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    if (dataset, ipc) == ("cifar100", 10):
        assert keeping == Keeping(moments="bfloat16")
        assert back["optimizer.0.step"] == 3 and back["optimizer.0.exp_avg"].dtype == torch.float32
    if (dataset, ipc) == ("cifar100", 50):
        assert keeping == Keeping(images="uint16", moments="none", teachers="float16")
        assert not any(name.startswith("optimizer.") for name in back)


def test_larger_folder_keeps_all_bits_and_a_smaller_one_is_refused() -> None:
    assert choose_keeping(content("cifar100", 50), 256 * MIB).is_exact
    assert choose_keeping(content("cifar10", 50, seeds=5), 64 * MIB) == Keeping(moments="bfloat16")
    with pytest.raises(ResourcesError, match="fewer --teachers"):
        choose_keeping(content("cifar100", 50, seeds=3), 64 * MIB)
    peaks = [choice.peak_bytes(content("cifar100", 50)) for choice in CHOICES]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3] > peaks[5]


def test_tensor_larger_than_a_file_is_cut_and_joined(tmp_path: Path) -> None:
    large, small = torch.rand(9, 3, 512, 512), torch.arange(5)
    tensors = {"small": small, "large": large, "scalar": torch.tensor(2.5)}
    assert all(sum(tensor.nbytes for tensor in shard.values()) < FILE_BYTES for shard in shards(tensors))
    Folder(tmp_path).save({"n": 1}, {"group": tensors})
    back = Folder(tmp_path).load("group")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_save_that_was_killed_leaves_the_one_before(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.save({"n": 1}, {"a": {"x": torch.ones(2)}, "b": {"y": torch.zeros(2)}})
    (tmp_path / "a-2-0.safetensors").write_bytes(b"half")
    (tmp_path / "run.json.partial").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("mine")

    again = Folder(tmp_path)
    assert again.record == {"n": 1} and torch.equal(again.load("a")["x"], torch.ones(2))
    again.save({"n": 2}, {"a": {}})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "b-1-0.safetensors", "notes.txt"}


def test_damaged_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    Folder(tmp_path).save({}, {"a": {"x": torch.ones(2)}})
    (tmp_path / "a-1-0.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is damaged.*Bring back all files"):
        Folder(tmp_path).load("a")
    (tmp_path / "a-1-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Folder(tmp_path).load("a")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Folder(tmp_path)
