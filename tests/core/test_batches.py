from __future__ import annotations

from typing import Any

import pytest
import torch

from ncfm_core.batches import Batch, Batches
from ncfm_core.datasets import Dataset
from ncfm_core.errors import SpecError
from ncfm_core.rng import generator
from ncfm_core.submission import resolve


def batches(digits: Dataset, *, targets: torch.Tensor | None = None, **changes: Any) -> Batches:
    training = resolve({"dataset": "digits", "ipc": 1}).evaluate[0].training.model_copy(update=changes)
    return Batches(digits.train_images[:20], digits.train_labels[:20], digits, spec=training, targets=targets)


def slow(loss: str, logits: torch.Tensor, target: torch.Tensor) -> float:
    """One image after the other, one class after the other."""
    total = 0.0
    for row, given in zip(logits.double(), target, strict=True):
        log_p = [value.item() for value in row - row.exp().sum().log()]
        if loss == "cross_entropy":
            total -= log_p[int(given)]
            continue
        wanted = given.double()
        q = (wanted.exp() / wanted.exp().sum()).tolist()
        for c in range(len(log_p)):
            if loss == "l1_logits":
                total += abs(row[c].item() - wanted[c].item()) / len(log_p)
            elif loss == "soft_cross_entropy":
                total -= q[c] * log_p[c]
            else:
                total += q[c] * (torch.tensor(q[c]).log().item() - log_p[c])
    return total / len(logits)


@pytest.mark.parametrize("loss", ["cross_entropy", "l1_logits", "soft_cross_entropy", "kl"])
def test_losses_equal_the_slow_formula_with_and_without_mixing(digits: Dataset, loss: str) -> None:
    draw = generator(0, "logits")
    logits, targets = torch.randn((20, 10), generator=draw), 3 * torch.randn((20, 10), generator=draw)
    labels = digits.train_labels[:20] if loss == "cross_entropy" else targets
    judge = batches(digits, loss=loss, targets=targets)
    images = digits.normalise(digits.train_images[:20])
    assert judge.loss(logits, Batch(images, labels, None, 1.0)).item() == pytest.approx(
        slow(loss, logits, labels), 1e-5
    )
    mixed = judge.loss(logits, Batch(images, labels, labels.flip(0), 0.3)).item()
    expected = 0.3 * slow(loss, logits, labels) + 0.7 * slow(loss, logits, labels.flip(0))
    assert mixed == pytest.approx(expected, rel=1e-5)
    stacked = judge.loss(logits.view(2, 10, 10), Batch(images, labels.view(2, 10, *labels.shape[1:]), None, 1.0))
    assert stacked.mean().item() == pytest.approx(slow(loss, logits, labels), rel=1e-5)


def test_loss_on_teacher_logits_needs_them(digits: Dataset) -> None:
    with pytest.raises(SpecError, match="soft labels"):
        batches(digits, loss="kl")


@pytest.mark.parametrize("batch_size", [8, 20])
def test_batches_of_several_networks_are_those_of_each(digits: Dataset, batch_size: int) -> None:
    targets = torch.randn((20, 10), generator=generator(0, "targets"))
    made = batches(digits, batch_size=batch_size, cutmix=0.7, loss="kl", targets=targets)
    streams = ("a", "b", "c")
    for step in range(2 * made.steps_per_epoch):
        orders = made.orders(step // made.steps_per_epoch, seed=0, streams=streams)
        draws = [made.draw(order, step, seed=0, stream=stream) for order, stream in zip(orders, streams, strict=True)]
        together, logits = made.stacked(draws), torch.randn((3, len(draws[0].chosen), 10))
        apart = [made.batch(draw) for draw in draws]
        torch.testing.assert_close(together.images, torch.stack([each.images for each in apart]))
        assert torch.equal(together.labels, torch.stack([each.labels for each in apart]))
        losses = torch.stack([made.loss(row, each) for row, each in zip(logits, apart, strict=True)])
        torch.testing.assert_close(made.loss(logits, together), losses)
