from __future__ import annotations

import pytest
import torch

from ncfm_core.schedule import PATIENCE, Schedule

CPU = torch.device("cpu")


def rates(losses: list[float], name: str = "plateau") -> list[float]:
    schedule = Schedule(name, 0.1, len(losses), CPU)  # type: ignore[arg-type]
    seen = []
    for step, loss in enumerate(losses):
        seen.append(schedule.rate(step))
        schedule.note(step, torch.tensor(loss))
    return seen


def test_constant_never_changes() -> None:
    assert set(rates([1.0] * 2000, "constant")) == {0.1}


def test_cosine_falls_from_the_rate_to_zero() -> None:
    seen = rates([1.0] * 100, "cosine")
    assert seen[0] == pytest.approx(0.1)
    assert seen[50] == pytest.approx(0.05)
    assert seen[-1] < 1e-3 * 0.1
    assert seen == sorted(seen, reverse=True)


def test_plateau_halves_when_the_loss_stands_still_and_not_before() -> None:
    """The rule of torch's ReduceLROnPlateau with the same patience, up to 24 steps late."""
    losses = [10.0 - 0.01 * step for step in range(300)] + [7.01] * 1200
    seen = rates(losses)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE)
    expected = []
    for loss in losses:
        expected.append(optimizer.param_groups[0]["lr"])
        reference.step(loss)
    assert seen[-1] == expected[-1] == 0.025
    for cut in (0.05, 0.025):
        assert 0 <= seen.index(cut) - expected.index(cut) < 25


def test_plateau_goes_on_from_a_state_between_two_looks() -> None:
    losses = [10.0] * 1400
    whole = Schedule("plateau", 0.1, 1400, CPU)
    for step, loss in enumerate(losses):
        whole.note(step, torch.tensor(loss))
        if step == 512:
            state = whole.state()
    resumed = Schedule("plateau", 0.1, 1400, CPU)
    resumed.load_state(state)
    for step in range(513, 1400):
        resumed.note(step, torch.tensor(losses[step]))
    assert resumed.rate(1400) == whole.rate(1400) == 0.025
