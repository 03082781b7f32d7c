from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ncfm_core.datasets import Dataset
from ncfm_core.rng import generator
from ncfm_core.synthetic import SyntheticSet, decode, encode, from_state, start, tiles, to_state


@pytest.mark.parametrize("size", [8, 9, 32])
def test_decode_of_tiles_gives_the_shrunk_and_enlarged_images_in_order(size: int) -> None:
    originals = torch.rand((8, 3, size, size), generator=generator(0, "images"))
    stored = encode(originals, 2)
    assert stored.shape == (2, 3, size, size)
    corners = [(top, left) for top in tiles(size, 2) for left in tiles(size, 2)]
    for index, image in enumerate(decode(stored, 2)):
        (top, bottom), (left, right) = corners[index % 4]
        shrunk = F.interpolate(
            originals[index : index + 1],
            (bottom - top, right - left),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        expected = F.interpolate(shrunk, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(image, expected[0])


def test_factor_one_stores_images_as_they_are() -> None:
    images = torch.rand((3, 1, 8, 8), generator=generator(0, "images"))
    assert decode(images, 1) is images
    assert encode(images, 1) is images


def test_odd_sizes_give_the_extra_pixel_to_the_earlier_tile() -> None:
    assert tiles(9, 2) == [(0, 5), (5, 9)]


@pytest.mark.parametrize("init", ["noise", "real", "tiled"])
@pytest.mark.parametrize("factor", [1, 2])
def test_start_is_sorted_by_class_inside_the_unit_range(digits: Dataset, init: str, factor: int) -> None:
    synthetic = start(digits, ipc=3, factor=factor, init=init, draw=generator(0, "init"))  # type: ignore[arg-type]
    assert synthetic.images.shape == (30, 1, 8, 8)
    assert 0 <= synthetic.images.min() and synthetic.images.max() <= 1
    assert synthetic.labels.tolist() == sorted(synthetic.labels.tolist())
    images, labels = synthetic.decode()
    assert len(images) == len(labels) == 30 * factor**2
    assert labels.bincount().tolist() == [3 * factor**2] * 10


def test_real_start_shows_images_of_the_class(digits: Dataset) -> None:
    synthetic = start(digits, ipc=2, factor=1, init="real", draw=generator(0, "init"))
    real = digits.train_images.flatten(1).float() / 255
    for image, label in zip(synthetic.images.flatten(1), synthetic.labels, strict=True):
        found = (real == image).all(1).nonzero().flatten()
        assert (digits.train_labels[found] == label).all() and len(found)


def test_start_at_the_largest_ipc_repeats_images_rather_than_fail(digits: Dataset) -> None:
    synthetic = start(digits, ipc=118, factor=2, init="tiled", draw=generator(0, "init"))
    assert len(synthetic.images) == 1180


def test_state_round_trip(digits: Dataset) -> None:
    synthetic = start(digits, ipc=2, factor=2, init="tiled", draw=generator(0, "init"))
    again = from_state(to_state(synthetic))
    assert torch.equal(again.images, synthetic.images)
    assert torch.equal(again.labels, synthetic.labels)
    assert (again.factor, again.ipc, again.num_classes) == (2, 2, 10)


@pytest.mark.parametrize(
    ("ipc", "factor", "rows", "columns"), [(1, 2, 5, 10), (3, 2, 10, 15), (3, 1, 10, 3), (12, 2, 10, 50)]
)
def test_preview_shows_what_the_images_decode_to(ipc: int, factor: int, rows: int, columns: int) -> None:
    images = torch.rand((10 * ipc, 3, 8, 8), generator=generator(0, "images"))
    labels = torch.arange(10).repeat_interleave(ipc)
    assert SyntheticSet(images, labels, factor).preview().shape == (3, rows * 66, columns * 66)


@pytest.mark.parametrize(("ipc", "rows", "columns"), [(1, 1, 10), (3, 10, 3)])
def test_grid_shows_every_image_once(ipc: int, rows: int, columns: int) -> None:
    labels = torch.arange(10).repeat_interleave(ipc)
    images = (torch.arange(10 * ipc) / 100).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    grid = SyntheticSet(images, labels, 1).grid()
    assert grid.shape == (1, rows * 66, columns * 66)
    centres = grid[0, 33::66, 33::66].flatten()
    assert centres.tolist() == [round(2.55 * i) for i in range(10 * ipc)]
