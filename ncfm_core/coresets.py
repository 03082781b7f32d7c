"""Real images chosen by a rule, as many as the set has: what a distilled set has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.devices import in_halves, require_device
from ncfm_core.errors import OutOfMemoryError
from ncfm_core.pools import TeacherPool
from ncfm_core.rng import generator
from ncfm_core.spec import CoresetName


def random_real(dataset: Dataset, *, ipc: int, seed: int) -> tuple[Tensor, Tensor]:
    """`ipc` random real images of each class.

    Returns:
        uint8 images of shape (C * ipc, channels, H, W) and their labels.

    Raises:
        SpecError: a class has fewer.
    """
    dataset.check_ipc(ipc)
    chosen = dataset.class_batches(ipc, generator(seed, "random-real")).flatten().to(dataset.device)
    return dataset.take(chosen), dataset.train_labels[chosen]


def coreset(
    name: CoresetName, dataset: Dataset, pool: TeacherPool, *, ipc: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`ipc` real images of each class, chosen in the feature space of a trained network; nothing is drawn.

    Args:
        name: `herding` or `k_center`.
        dataset: the real data.
        pool: its first teacher's trained end gives the features: flat, of the penultimate layer, of their own length.
        ipc: images per class.
        device: of the pool.

    Returns:
        uint8 images of shape (C * ipc, channels, H, W) and their labels, class by class in the order of the choice.

    Raises:
        SpecError: a class has fewer.
        ResourcesError: there is no such device, or so few images as a batch has do not fit its memory, nor do half as many.
    """
    dataset.check_ipc(ipc)
    require_device(device)
    choose = {"herding": herding, "k_center": k_center}[name]
    weights = pool.trained(0)

    def features(indices: Tensor, size: int) -> Tensor:
        parts = indices.split(size)
        return torch.cat(
            [pool.raw_features(weights, dataset.normalise(dataset.take(part).to(device))) for part in parts]
        )

    def chosen(size: int) -> Tensor:
        rows = []
        for members, count in zip(dataset.members, dataset.class_counts, strict=True):
            indices = members[:count].to(dataset.device)
            rows.append(indices[choose(features(indices, size), ipc).to(dataset.device)])
        return torch.cat(rows)

    def full(size: int) -> OutOfMemoryError:
        message = f"the features of {size} images at once do not fit the memory of {device}"
        return OutOfMemoryError.of("model.width", None, message, "Lower it, or the image size.")

    order = in_halves(chosen, pool.forward_batch(), full=full, device=device)
    return dataset.take(order), dataset.train_labels[order]


def herding(features: Tensor, count: int) -> Tensor:
    """Greedily those whose mean stays nearest to the mean of all (Welling 2009; iCaRL, arXiv 1611.07725, section 3.2).

    Args:
        features: shape (N, D).
        count: how many, at most N.

    Returns:
        int64 of shape (count,), in the order of the choice; ties go to the lowest index.
    """
    mean, total = features.mean(dim=0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    # |mean - (total + x) / k|^2 without what is the same for all x: |x|^2 - 2 x (k mean - total), over k^2.
    lengths = features.square().sum(dim=1)
    for k in range(1, count + 1):
        distance = lengths - 2 * (features @ (k * mean - total))
        # Of shape (1,): an index without one would be read on the host, which waits for the device.
        best = distance.masked_fill(~left, torch.inf).argmin().view(1)
        chosen.append(best)
        left.index_fill_(0, best, False)
        total = total + features[best].view(-1)
    return torch.cat(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """Greedily the one farthest from those chosen, from the one nearest to the mean on (arXiv 1708.00489, algorithm 1).

    Args:
        features: shape (N, D).
        count: how many, at most N.

    Returns:
        int64 of shape (count,), in the order of the choice; ties go to the lowest index.
    """
    # Indices of shape (1,): without one they would be read on the host, which waits for the device.
    best = (features - features.mean(dim=0)).square().sum(dim=1).argmin().view(1)
    chosen = [best]
    nearest = torch.full_like(features[:, 0], torch.inf)
    for _ in range(1, count):
        nearest = torch.minimum(nearest, (features - features[best]).square().sum(dim=1))
        # Chosen ones stay out even where several images have the same features.
        nearest.index_fill_(0, best, -1.0)
        best = nearest.argmax().view(1)
        chosen.append(best)
    return torch.cat(chosen)
