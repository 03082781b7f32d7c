"""How a set is judged: the recipes that the papers train their students by, each under its name. Torch-free.

Sources and departures: docs/evaluation.md. Where a field of a recipe was changed it is no longer that protocol (`submission`).
"""

from __future__ import annotations

from typing import get_args

from pydantic import JsonValue

from ncfm_core.catalog import DatasetFacts
from ncfm_core.spec import ProtocolName

Document = dict[str, JsonValue]

PROTOCOLS: tuple[ProtocolName, ...] = tuple(name for name in get_args(ProtocolName) if name != "custom")
"""Those with a recipe."""

NCFM_BUDGETS: dict[str, tuple[tuple[int, int, int], ...]] = {"tiny-imagenet": ((50, 40, 8), (10, 300, 6))}
"""Data set to (from this IPC on, epochs, tests) where the released configurations have other than 2000 epochs and 20 tests."""

APM_RATES: dict[str, tuple[tuple[int, float], ...]] = {
    "cifar100": ((50, 0.04), (1, 0.02)),
    "tiny-imagenet": ((1, 0.1),),
}
"""Data set to (from this IPC on, rate) of the authors' Table A9; elsewhere it is that of CIFAR-10."""
APM_SHORT: dict[str, int] = {"cifar10": 1000, "cifar100": 100, "tiny-imagenet": 100}
"""Data set to the IPC from which on 600 epochs do."""

RATE_FRACTION = 0.1
"""Share of each class's training images that a rate out of `lr_grid` is chosen on."""
DDRANKING_RATES = (0.001, 0.005, 0.01, 0.05, 0.1)
"""What the board chooses from."""


def protocol(name: str, facts: DatasetFacts, ipc: JsonValue) -> Document:
    """An entry of `evaluate` but its model.

    Args:
        name: one of `PROTOCOLS`.
        facts: the data set.
        ipc: images per class as submitted, not yet validated; anything but a whole number counts as 1.
    """
    count = ipc if isinstance(ipc, int) else 1
    recipe: Document
    match name:
        case "dc":
            recipe = {"students": 5, "tests": 10, "training": _dc_training(facts, 1000)}
        case "apm":
            recipe = {"students": 5, "tests": 10, "training": _apm_training(facts, count)}
        case "ddranking":
            recipe = _ddranking(facts)
        case "quick":
            recipe = _quick(facts)
        case _:
            recipe = _ncfm(facts, count)
    entry: Document = {"protocol": name, "lr_grid": []}
    return entry | recipe


def held_out_count(count: int, fraction: float) -> int:
    """Training images of a class of `count` that a split holds out."""
    return max(1, round(fraction * count))


def augmentation(facts: DatasetFacts, policy: str, *ops: str) -> Document:
    """An `AugmentSpec`, without the flip where a mirrored image changes its class."""
    return {"policy": policy, "ops": [op for op in ops if op != "flip" or facts.flip]}


def _sgd(facts: DatasetFacts) -> Document:
    """What DC, APM and DD-Ranking share: SGD with momentum on large batches, one operation of DSA per batch."""
    return {
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 5e-4,
        "gamma": 0.1,
        "reset_optimizer": False,
        "augment": augmentation(facts, "single", "color", "crop", "cutout", "flip", "scale", "rotate"),
        "cutmix": 0.0,
        "loss": "cross_entropy",
    }


def _dc_training(facts: DatasetFacts, nominal: int) -> Document:
    """E nominal epochs are E + 1 passes; after pass E/2 + 1, counted from 0, comes a new optimiser with a tenth of the rate."""
    passes = nominal + 1
    first_slow = nominal // 2 + 2
    return _sgd(facts) | {"epochs": passes, "milestones": [first_slow / passes], "reset_optimizer": True}


def _apm_training(facts: DatasetFacts, ipc: int) -> Document:
    """DC's training with the teacher's logits for labels."""
    rates = APM_RATES.get(facts.name, ((1, 0.02),))
    rate = next((rate for least, rate in rates if ipc >= least), rates[-1][1])
    nominal = 600 if ipc >= APM_SHORT.get(facts.name, ipc + 1) else 1000
    return _dc_training(facts, nominal) | {"lr": rate, "loss": "l1_logits"}


def _ddranking(facts: DatasetFacts) -> Document:
    training = _sgd(facts) | {"epochs": 1000, "milestones": [0.5]}
    return {"students": 5, "tests": 100, "training": training, "lr_grid": list(DDRANKING_RATES)}


def _ncfm(facts: DatasetFacts, ipc: int) -> Document:
    """The protocol of the paper's released configurations, but the last epoch is what counts."""
    budgets = NCFM_BUDGETS.get(facts.name, ())
    epochs, tests = next(((epochs, tests) for least, epochs, tests in budgets if ipc >= least), (2000, 20))
    training: Document = {
        "epochs": epochs,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.01,
        "milestones": [0.2, 0.4, 0.6, 0.8],
        "gamma": 0.5,
        "reset_optimizer": False,
        "augment": augmentation(facts, "stack", "flip", "color", "crop", "scale", "rotate"),
        "cutmix": 0.5,
        "loss": "cross_entropy",
    }
    return {"students": 10, "tests": tests, "training": training}


def _quick(facts: DatasetFacts) -> Document:
    """The paper's protocol with fewer epochs at a higher rate, for narrow networks and small sets."""
    training = _ncfm(facts, 1)["training"]
    assert isinstance(training, dict)
    return {"students": 5, "tests": 10, "training": training | {"epochs": 300, "lr": 5e-3}}
