from __future__ import annotations

import pytest
import torch

from ncfm_core.datasets import Dataset
from ncfm_core.errors import CheckpointError
from ncfm_core.models import build_model
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from ncfm_core.training import Training, accuracy, learning_rate

CPU = torch.device("cpu")


def training(digits: Dataset, spec: JobSpec, **changes: object) -> Training:
    recipe = spec.teachers.training.model_copy(update=changes)
    model = build_model(spec.model, image_shape=digits.image_shape, num_classes=10, draw=generator(0, "init"))
    return Training(
        model, digits.train_images[:300], digits.train_labels[:300], digits, spec=recipe, seed=0, stream="test"
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 2, 4, 10])
def test_training_that_was_stopped_goes_on_with_the_same_bits(
    digits: Dataset, spec: JobSpec, optimizer: str, stop: int
) -> None:
    whole, first, second = (training(digits, spec, optimizer=optimizer) for _ in range(3))
    for _ in whole.run():
        pass
    for _ in first.run(until=stop):
        pass
    second.load_state(first.state())
    assert second.step == stop
    for _ in second.run():
        pass
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("stop", range(1, 12))
def test_training_in_the_manner_of_dc_goes_on_with_the_same_bits_wherever_it_stopped(
    digits: Dataset, spec: JobSpec, stop: int
) -> None:
    changes = {"epochs": 4, "milestones": (0.5,), "gamma": 0.1, "reset_optimizer": True, "cutmix": 0.0}
    whole, first, second = (training(digits, spec, **changes) for _ in range(3))
    assert whole.total == 12 and whole.steps_per_epoch == 3
    for _ in whole.run():
        pass
    for _ in first.run(until=stop):
        pass
    second.load_state(first.state())
    for _ in second.run():
        pass
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_momentum_is_dropped_at_the_milestone_and_nowhere_else(digits: Dataset, spec: JobSpec) -> None:
    changes = {"epochs": 4, "milestones": (0.5,), "weight_decay": 0.0, "cutmix": 0.0}
    run = training(digits, spec, reset_optimizer=True, **changes)
    fresh = []
    for step in range(run.total):
        for _ in run.run(until=step + 1):
            pass
        parameter = next(iter(run.model.parameters()))
        fresh.append(torch.equal(run.optimizer.state[parameter]["momentum_buffer"], parameter.grad))  # type: ignore[arg-type]
    assert [step for step, is_fresh in enumerate(fresh) if is_fresh] == [0, 6]
    kept = training(digits, spec, reset_optimizer=False, **changes)
    for _ in kept.run(until=7):
        pass
    parameter = next(iter(kept.model.parameters()))
    assert not torch.equal(kept.optimizer.state[parameter]["momentum_buffer"], parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [1, 4])
def test_training_of_a_batch_norm_network_goes_on_with_the_same_bits_and_buffers(
    digits: Dataset, spec: JobSpec, stop: int
) -> None:
    batch = spec.model_copy(update={"model": spec.model.model_copy(update={"norm": "batch"})})
    whole, first, second = (training(digits, batch) for _ in range(3))
    for _ in whole.run():
        pass
    for _ in first.run(until=stop):
        pass
    accuracy(first.model, digits)
    second.load_state(first.state())
    for _ in second.run():
        pass
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert expected["norms.0.num_batches_tracked"] == whole.total
    assert expected["norms.0.num_batches_tracked"].dtype == torch.int64
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_accuracy_is_that_of_evaluation_mode_and_leaves_the_model_as_it_was(digits: Dataset, spec: JobSpec) -> None:
    batch = spec.model_copy(update={"model": spec.model.model_copy(update={"norm": "batch"})})
    run = training(digits, batch, epochs=3)
    for _ in run.run():
        pass
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    measured = accuracy(run.model, digits)
    assert run.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    run.model.eval()
    right = (run.model(digits.normalise(digits.test_images)).argmax(1) == digits.test_labels).float().mean()
    assert measured == pytest.approx(100 * right.item())
    accuracy(run.model, digits)
    assert not run.model.training


def test_an_epoch_shows_every_image_once(digits: Dataset, spec: JobSpec) -> None:
    run = training(digits, spec)
    seen: list[int] = []
    for step in range(run.steps_per_epoch):
        for _ in run.run(until=step + 1):
            pass
        place = step * run.batch_size
        seen += run._order[place : place + run.batch_size].tolist()
    assert sorted(seen) == list(range(300))


def test_rate_falls_at_the_milestones() -> None:
    recipe = resolve({"dataset": "cifar10", "ipc": 1}).teachers.training
    rates = [learning_rate(recipe, epoch) for epoch in range(60)]
    assert rates == pytest.approx([0.01] * 40 + [0.002] * 10 + [0.0004] * 10)


def test_state_of_another_training_is_refused(digits: Dataset, spec: JobSpec) -> None:
    other = training(digits, spec.model_copy(update={"model": spec.model.model_copy(update={"width": 8})}))
    with pytest.raises(CheckpointError, match="does not fit"):
        training(digits, spec).load_state(other.state())


def test_teachers_depend_on_seed_and_index_alone(digits: Dataset, spec: JobSpec) -> None:
    def weights(seed: int, index: int) -> dict[str, torch.Tensor]:
        recipe = spec.teachers.training.model_copy(update={"epochs": 1})
        teacher = TeacherTraining(digits, spec.model, recipe, seed=seed, index=index, device=CPU)
        for _ in teacher.run():
            pass
        return teacher.result()

    first, again, second, reseeded = weights(0, 0), weights(0, 0), weights(0, 1), weights(1, 0)
    name = "trained.classifier.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], reseeded[name])
    assert not torch.equal(first[name], first["initial.classifier.weight"])


def test_teacher_learns(digits: Dataset, spec: JobSpec) -> None:
    teacher = TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=0, device=CPU)
    before = teacher.accuracy()
    for _ in teacher.run():
        pass
    assert before < 30 < 50 < teacher.accuracy()


def test_pool_blends_the_two_ends_of_one_teacher(pool: TeacherPool) -> None:
    seen = set()
    for step in range(30):
        extractors = pool.draw(generator(0, "draw", step))
        index = next(
            i
            for i in range(pool.count)
            if torch.equal(pool._trained["classifier.bias"][i], extractors.calibrate["classifier.bias"])
        )
        seen.add(index)
        beta = {
            round(
                ((extractors.match[n] - initial[index]) / (pool._trained[n][index] - initial[index])).median().item(), 3
            )
            for n, initial in pool._initial.items()
        }
        assert len(beta) == 1 and 0 <= beta.pop() <= 1
    assert seen == set(range(pool.count))


def test_features_have_length_one(digits: Dataset, pool: TeacherPool) -> None:
    weights = pool.draw(generator(0, "draw")).match
    features = pool.features(weights, digits.normalise(digits.test_images[:5]))
    assert features.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_batch_in_pieces_trains_like_the_whole(digits: Dataset, spec: JobSpec, cutmix: float) -> None:
    whole, pieces = (training(digits, spec, cutmix=cutmix) for _ in range(2))
    pieces._chunk = 7
    losses = [[report.metrics["loss"] for report in run.run(until=4)] for run in (whole, pieces)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for left, right in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_batch_norm_is_never_cut_into_pieces(digits: Dataset, spec: JobSpec) -> None:
    batch = spec.model_copy(update={"model": spec.model.model_copy(update={"norm": "batch"})})
    run = training(digits, batch)
    assert run._chunk == run.batch_size


def test_pause_ends_a_training_after_that_step(digits: Dataset, spec: JobSpec) -> None:
    run = training(digits, spec)
    reports = list(run.run(pause=lambda: run.step >= 3))
    assert (run.step, [each.completed for each in reports]) == (3, [3])
