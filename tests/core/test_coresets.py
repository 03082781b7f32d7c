from __future__ import annotations

import pytest
import torch

from ncfm_core.coresets import coreset, herding, k_center, random_real
from ncfm_core.datasets import Dataset
from ncfm_core.errors import SpecError
from ncfm_core.pools import TeacherPool
from ncfm_core.rng import generator
from ncfm_core.spec import CORESETS, CoresetName

CPU = torch.device("cpu")


def features(count: int = 25) -> torch.Tensor:
    return torch.randn((count, 4), generator=generator(0, "features"), dtype=torch.float64)


def slow_herding(points: list[torch.Tensor], count: int) -> list[int]:
    mean = torch.stack(points).mean(0)
    chosen: list[int] = []
    while len(chosen) < count:
        left = [index for index in range(len(points)) if index not in chosen]
        chosen.append(
            min(left, key=lambda i: (mean - torch.stack([points[j] for j in [*chosen, i]]).mean(0)).norm().item())
        )
    return chosen


def slow_k_center(points: list[torch.Tensor], count: int) -> list[int]:
    mean = torch.stack(points).mean(0)
    chosen = [min(range(len(points)), key=lambda i: (points[i] - mean).norm().item())]
    while len(chosen) < count:
        left = [index for index in range(len(points)) if index not in chosen]
        chosen.append(max(left, key=lambda i: min((points[i] - points[j]).norm().item() for j in chosen)))
    return chosen


@pytest.mark.parametrize("count", [1, 2, 9, 25])
def test_choices_equal_a_slow_search(count: int) -> None:
    points = features()
    assert herding(points, count).tolist() == slow_herding(list(points), count)
    assert k_center(points, count).tolist() == slow_k_center(list(points), count)


def test_images_that_are_alike_are_each_chosen_once() -> None:
    points = torch.zeros(5, 3)
    for choose in (herding, k_center):
        assert choose(points, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", CORESETS)
def test_coreset_takes_as_many_of_each_class_by_the_teachers_features(
    digits: Dataset, pool: TeacherPool, name: CoresetName
) -> None:
    images, labels = coreset(name, digits, pool, ipc=3, device=CPU)
    assert images.dtype == torch.uint8 and images.shape == (30, 1, 8, 8)
    assert labels.bincount().tolist() == [3] * 10
    assert torch.equal(images, coreset(name, digits, pool, ipc=3, device=CPU)[0])
    members = digits.members[4][: digits.class_counts[4]]
    weights = pool.trained(0)
    found = torch.func.functional_call(
        pool.network, weights, (digits.normalise(digits.train_images[members]),), {"features_only": True}
    )
    slow = {"herding": slow_herding, "k_center": slow_k_center}[name](list(found.double()), 3)
    assert torch.equal(images[labels == 4], digits.train_images[members[slow]])


def test_class_that_is_too_small_is_named(digits: Dataset, pool: TeacherPool) -> None:
    with pytest.raises(SpecError, match="1 to 118"):
        random_real(digits, ipc=119, seed=0)
    with pytest.raises(SpecError, match="smallest class"):
        coreset("herding", digits, pool, ipc=119, device=CPU)
