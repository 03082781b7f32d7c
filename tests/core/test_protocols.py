"""The protocols against the numbers that the papers' code has."""

from __future__ import annotations

from typing import Any

import pytest

from ncfm_core.catalog import dataset_facts
from ncfm_core.errors import SpecError
from ncfm_core.protocols import PROTOCOLS, protocol
from ncfm_core.spec import EvaluationSpec, TrainingSpec
from ncfm_core.submission import resolve
from ncfm_core.training import learning_rate, milestones_passed

NATURAL = ("color", "crop", "cutout", "flip", "scale", "rotate")


def judged(name: str, dataset: str = "cifar10", ipc: int = 10) -> EvaluationSpec:
    return resolve({"dataset": dataset, "ipc": ipc, "evaluate": [{"protocol": name}]}).evaluate[0]


def recipe(name: str, dataset: str, ipc: int) -> TrainingSpec:
    """Also of protocols that the default method cannot be judged by."""
    document: Any = protocol(name, dataset_facts(dataset), ipc)
    base: Any = judged("ncfm").training.model_dump(mode="json")
    return TrainingSpec.model_validate(base | document["training"], strict=False)


def rates(training: TrainingSpec) -> list[float]:
    return [learning_rate(training, epoch) for epoch in range(training.epochs)]


def test_dc_has_1001_passes_and_a_new_optimiser_after_the_502nd() -> None:
    entry = judged("dc")
    training = entry.training
    assert rates(training) == pytest.approx([0.01] * 502 + [0.001] * 499)
    assert training.reset_optimizer and milestones_passed(training, 501) == 0 and milestones_passed(training, 502) == 1
    assert (training.optimizer, training.weight_decay, training.batch_size) == ("sgd", 5e-4, 256)
    assert (training.augment.policy, training.augment.ops, training.cutmix) == ("single", NATURAL, 0.0)
    assert (training.loss, entry.students, entry.lr_grid) == ("cross_entropy", 5, ())


def test_ncfm_halves_the_rate_at_every_fifth_of_2000_epochs() -> None:
    entry = judged("ncfm")
    training = entry.training
    expected = [1e-3 / 2**step for step in range(5) for _ in range(400)]
    assert rates(training) == pytest.approx(expected)
    assert (training.optimizer, training.weight_decay, training.batch_size) == ("adamw", 0.01, 128)
    assert (training.cutmix, training.loss, training.reset_optimizer) == (0.5, "cross_entropy", False)
    assert training.augment.policy == "stack" and "cutout" not in training.augment.ops
    assert (entry.students, entry.tests) == (10, 20)


@pytest.mark.parametrize(
    ("dataset", "ipc", "rate", "nominal"),
    [
        ("cifar10", 50, 0.02, 1000),
        ("cifar10", 500, 0.02, 1000),
        ("cifar10", 1000, 0.02, 600),
        ("fashion-mnist", 10, 0.02, 1000),
    ],
)
def test_apm_has_the_rates_and_epochs_of_its_table(dataset: str, ipc: int, rate: float, nominal: int) -> None:
    training = recipe("apm", dataset, ipc)
    assert training.epochs == nominal + 1
    slow = nominal // 2 + 2
    assert rates(training) == pytest.approx([rate] * slow + [rate / 10] * (nominal + 1 - slow))
    assert (training.loss, training.reset_optimizer, training.augment.policy) == ("l1_logits", True, "single")


def test_ddranking_chooses_among_five_rates_and_drops_to_a_tenth_half_way() -> None:
    entry = judged("ddranking")
    assert entry.lr_grid == (0.001, 0.005, 0.01, 0.05, 0.1)
    assert rates(entry.training) == pytest.approx([0.01] * 500 + [0.001] * 500)
    assert (entry.training.optimizer, entry.training.batch_size, entry.tests) == ("sgd", 256, 100)
    assert not entry.training.reset_optimizer


def test_digits_are_never_mirrored() -> None:
    for name in PROTOCOLS:
        assert "flip" not in recipe(name, "mnist", 1).augment.ops
        assert "flip" in recipe(name, "cifar10", 1).augment.ops


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "apm"])
def test_protocol_keeps_its_name_until_a_field_is_changed(name: str) -> None:
    entries: list[Any] = [
        {"protocol": name},
        {"protocol": name, "students": 2, "tests": 3, "model": {"width": 64}},
        {"protocol": name, "training": {"epochs": 7}},
        {"protocol": name, "lr_grid": [0.3]},
    ]
    spec = resolve({"dataset": "cifar10", "ipc": 1, "evaluate": entries})
    assert [entry.protocol for entry in spec.evaluate] == [name, name, "custom", "custom"]
    assert resolve(spec.document()) == spec


def test_a_rate_set_by_hand_is_not_chosen_over() -> None:
    submission: Any = {"dataset": "cifar10", "ipc": 1}
    entry: Any = {"protocol": "ddranking", "training": {"lr": 0.3}}
    spec = resolve(submission | {"evaluate": [entry]})
    assert spec.evaluate[0].lr_grid == () and spec.evaluate[0].protocol == "custom"
    assert resolve(submission | {"evaluate": [entry | {"lr_grid": [0.1, 0.2]}]}).evaluate[0].lr_grid == (0.1, 0.2)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"evaluate": [{"protocol": "apm"}]}, "evaluate.0.protocol", "soft labels"),
    ({"evaluate": [{}, {"training": {"loss": "kl"}}]}, "evaluate.1.training.loss", "soft labels"),
    ({"teachers": {"training": {"loss": "kl"}}}, "teachers.training.loss", "cross_entropy"),
    ({"full_data": {"training": {"loss": "l1_logits"}}}, "full_data.training.loss", "cross_entropy"),
    ({"evaluate": [{"protocol": "ddrankin"}]}, "evaluate.0.protocol", "ddranking"),
    ({"evaluate": [{"lr_grid": [0.1, -1.0]}]}, "evaluate.0.lr_grid.1", "greater"),
    ({"ipc": 110, "evaluate": [{"lr_grid": [0.1, 0.2]}]}, "evaluate.0.lr_grid", "1 to 106"),
    ({"baselines": ["herding"]}, "baselines", "random_real"),
    ({"baselines": ["random_real", "random_real"]}, "baselines", "once"),
    ({"baselines": ["random_real", "hearding"]}, "baselines.1", "'herding'"),
]


@pytest.mark.parametrize(("parts", "field", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_judged_is_refused(parts: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve({"dataset": "digits", "ipc": 1, **parts})
    assert field in [problem.field for problem in caught.value.problems]
    assert says in str(caught.value)
