"""How a step is cut up must not change what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ncfm_core import distill
from ncfm_core import execution as execution_module
from ncfm_core.datasets import Dataset
from ncfm_core.discrepancy import CharacteristicFunction, characteristic_function_by_class
from ncfm_core.distill import Distillation
from ncfm_core.errors import ResourcesError
from ncfm_core.execution import (
    COMPILE_OPERATIONS,
    COMPILE_SECONDS,
    Execution,
    choose,
    compiler_works,
    compiling_pays,
    even_chunks,
    for_inference,
)
from ncfm_core.models import build_model
from ncfm_core.pools import TeacherPool, in_bfloat16
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec, ModelSpec, NcfmSpec
from ncfm_core.submission import resolve

CPU = torch.device("cpu")


def method(spec: JobSpec, **changes: Any) -> NcfmSpec:
    return resolve(spec.document() | {"method": spec.document()["method"] | changes}).method  # type: ignore[operator]


def distilled(
    digits: Dataset, pool: TeacherPool, method: NcfmSpec, execution: dict[str, Any], *, steps: int = 3
) -> Distillation:
    run = Distillation(digits, pool, method, ipc=2, seed=0, device=CPU)
    run._carry_out(replace(run.execution, **execution))
    for _ in run.run(until=steps):
        pass
    return run


@pytest.mark.parametrize(
    "execution",
    [{"block": 1}, {"block": 3}, {"chunk": 3}, {"chunk": 5, "block": 4, "recompute": True}, {"recompute": True}],
)
@pytest.mark.parametrize("discrepancy", ["characteristic", "mean"])
def test_blocks_chunks_and_recomputing_give_the_same_images(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, execution: dict[str, Any], discrepancy: str
) -> None:
    changes = method(spec, discrepancy=discrepancy)
    whole = distilled(digits, pool, changes, {"block": 10, "chunk": 10_000, "recompute": False})
    cut = distilled(digits, pool, changes, execution)
    torch.testing.assert_close(cut.synthetic.images, whole.synthetic.images, atol=2e-5, rtol=1e-4)


def test_joint_gradient_is_that_of_each_class_alone(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    """A class's gradient is the same whichever classes stand in its block (methods of one step per class are the case of one)."""
    joint, apart = (Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU) for _ in range(2))
    for run, block in ((joint, 10), (apart, 1)):
        run._carry_out(replace(run.execution, block=block))
        run._open_draw()
    torch.testing.assert_close(joint._gradient()[0], apart._gradient()[0], atol=2e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, which looks at its inputs
@pytest.mark.usefixtures("compiler")
def test_compiled_networks_give_the_same_images(digits: Dataset, pool: TeacherPool, spec: JobSpec) -> None:
    eager, compiled = (distilled(digits, pool, method(spec), {"compiled": each}) for each in (False, True))
    assert compiled.execution.compiled
    torch.testing.assert_close(compiled.synthetic.images, eager.synthetic.images, atol=1e-3, rtol=1e-3)


class Scarce:
    """A network that fails like a full memory whenever more than `most` images go through it at once."""

    def __init__(self, pool: TeacherPool, most: int, error: Exception) -> None:
        self.pool, self.most, self.error, self.failed = pool, most, error, 0

    def features(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        if len(images) > self.most:
            self.failed += 1
            raise self.error
        return TeacherPool.features(self.pool, weights, images)


FULL = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", FULL)
def test_full_memory_is_tried_once_more_with_half_as_much(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU)
    run._carry_out(replace(run.execution, chunk=64, block=10))
    scarce = Scarce(pool, 40, error)
    monkeypatch.setattr(run, "_features_forward", scarce.features)
    monkeypatch.setattr(run, "_carry_out", lambda execution: setattr(run, "execution", execution))
    for _ in run.run(until=2):
        pass
    assert (run.halvings, scarce.failed) == (1, 1)
    assert run.execution.chunk == 32
    resumed = Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU)
    resumed.load_state(run.state())
    assert (resumed.halvings, resumed.execution) == (1, run.execution)


def test_psi_when_memory_runs_out_after_its_ascent_climbs_once(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, run = (Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU) for _ in range(2))
    list(undisturbed.run(until=1))
    transform, failures = characteristic_function_by_class, [FULL[0]]

    def scarce(features: Tensor, frequencies: Tensor) -> CharacteristicFunction:
        if failures:
            raise failures.pop()
        return transform(features, frequencies)

    monkeypatch.setattr(distill, "characteristic_function_by_class", scarce)
    list(run.run(until=1))
    assert run.halvings == 1
    assert torch.equal(run.state()["sampler.log_scales"], undisturbed.state()["sampler.log_scales"])


def test_memory_that_stays_full_names_the_knob(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU)
    before = run.synthetic.images.detach().clone()
    monkeypatch.setattr(run, "_features_forward", Scarce(pool, 0, FULL[0]).features)
    with pytest.raises(ResourcesError, match=r"resources\.memory_limit: .*even with"):
        list(run.run(until=1))
    assert torch.equal(run.synthetic.images, before)


def test_other_errors_are_not_taken_for_a_full_memory(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(digits, pool, method(spec), ipc=2, seed=0, device=CPU)
    monkeypatch.setattr(run, "_features_forward", Scarce(pool, 0, RuntimeError("shapes do not fit")).features)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(run.run(until=1))
    assert run.halvings == 0


def chosen(pool: TeacherPool, **changes: Any) -> Execution:
    arguments: dict[str, Any] = {
        "image_shape": (1, 8, 8),
        "num_classes": 10,
        "images_per_class": 400,
        "device": CPU,
        "forwards": 1e6,
        "memory_limit": None,
        "together": False,
        "compiled": False,
    }
    weights = pool.draw(generator(0, "weights")).match
    return choose(pool.features, weights, **(arguments | changes))


def test_memory_limit_makes_pieces_smaller_down_to_recomputing(pool: TeacherPool) -> None:
    free, some, least = (chosen(pool, memory_limit=limit) for limit in (None, 32 << 20, 1 << 20))
    assert free.block >= some.block > least.block == 1
    assert free.chunk >= some.chunk > least.chunk >= 1
    assert least.recompute and not some.recompute


def test_networks_with_batch_statistics_are_never_cut(pool: TeacherPool) -> None:
    execution = chosen(pool, together=True, memory_limit=1 << 20)
    assert execution.block == 10 and execution.chunk > 1e6 and not execution.recompute


def test_compiling_is_for_long_runs(pool: TeacherPool) -> None:
    assert not chosen(pool, compiled=None, forwards=1e3).compiled
    assert chosen(pool, compiled=None, forwards=1e12).compiled == compiler_works("cpu")


@pytest.mark.parametrize(
    ("seconds", "compiled"),
    [
        (None, True),
        (1e6, True),
        (4 * COMPILE_SECONDS, True),
        (4 * COMPILE_SECONDS - 1, False),
        (60.0, False),
        (0.0, False),
    ],
)
def test_compiling_is_for_runs_whose_time_can_pay_it_back(
    pool: TeacherPool, monkeypatch: pytest.MonkeyPatch, seconds: float | None, compiled: bool
) -> None:
    tried = list[str]()

    def works(kind: str) -> bool:
        tried.append(kind)
        return True

    monkeypatch.setattr(execution_module, "compiler_works", works)
    assert chosen(pool, compiled=None, forwards=1e12, seconds=seconds).compiled == compiled
    # The trial takes seconds as well: without a chance to pay there is none.
    assert tried == ["cpu"] * compiled
    assert chosen(pool, compiled=True, seconds=seconds).compiled


def test_only_work_that_fits_the_time_pays_for_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_module, "compiler_works", lambda kind: True)
    monkeypatch.setattr(execution_module, "CPU_RATE", COMPILE_OPERATIONS["cpu"] / 1000 / torch.get_num_threads())
    assert compiling_pays(1e15, CPU, 1001.0)
    assert not compiling_pays(1e15, CPU, 999.0)
    assert not compiling_pays(1e9, CPU, 1001.0)


def test_distillation_with_little_time_runs_eager_and_a_resumed_one_as_it_was(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "compiler_works", lambda kind: True)
    changes, given = method(spec, steps=1_000_000), {"ipc": 2, "seed": 0, "device": CPU}
    free, short = (Distillation(digits, pool, changes, **given, seconds=each) for each in (None, 60.0))  # type: ignore[arg-type]
    assert (free.execution.compiled, short.execution.compiled) == (True, False)
    short.load_state(free.state())
    assert short.execution.compiled


def test_execution_survives_its_encoding() -> None:
    execution = Execution(chunk=7, block=3, recompute=True, compiled=False)
    assert Execution.decode(execution.encode()) == execution


@pytest.mark.parametrize(
    ("number", "chunk", "sizes"), [(10, 16, {10}), (640, 16, {16}), (650, 16, {13}), (31, 16, {16, 15})]
)
def test_chunks_are_equal_where_the_number_allows(number: int, chunk: int, sizes: set[int]) -> None:
    assert {len(piece) for piece in even_chunks(torch.zeros(number, 1), chunk)} == sizes


def colour(number: int) -> Tensor:
    return torch.randn((number, 3, 32, 32), generator=generator(0, "images"))


@pytest.mark.parametrize("norm", ["instance", "group", "none", "batch"])
def test_network_cast_to_bfloat16_gives_features_within_its_rounding(digits: Dataset, norm: Any) -> None:
    """What a GPU does instead of autocast, on the CPU, at a width and an image size of the papers."""
    model = ModelSpec(name="convnet", depth=3, width=64, norm=norm)
    ends = build_model(model, image_shape=(3, 32, 32), num_classes=10, draw=generator(0, "t")).state_dict()
    teacher = {f"{end}.{name}": tensor for end in ("initial", "trained") for name, tensor in ends.items()}
    data = Dataset(
        name="made",
        train_images=torch.zeros((10, 3, 32, 32), dtype=torch.uint8),
        train_labels=torch.arange(10),
        test_images=torch.zeros((10, 3, 32, 32), dtype=torch.uint8),
        test_labels=torch.arange(10),
        class_names=digits.class_names,
        mean=torch.zeros(3),
        std=torch.ones(3),
    )
    pool = TeacherPool(model, data, [teacher], CPU)
    weights, images = pool.trained(0), colour(16)
    exact = pool.features(weights, images)
    low = pool.features(in_bfloat16(weights), images.to(torch.bfloat16))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.norm(dim=1), torch.ones(16), atol=1e-5, rtol=0)
    # Both are of length 1; bfloat16 has 8 bits, and each layer rounds once or twice more.
    difference = (low - exact).norm(dim=1)
    assert difference.max() < 4 * 2**-8, difference
    # Rounding does not shift all images the same way: what a class mean loses is less.
    assert (low.mean(0) - exact.mean(0)).norm() < 2 * 2**-8


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_group_norm_of_bfloat16_takes_its_statistics_in_float32(groups: int) -> None:
    """Maps whose mean is far from zero, where statistics in bfloat16 would be worth nothing, and whose spread is near eps."""
    for shift, spread in ((8.0, 1.0), (0.0, 1e-2)):
        maps = (torch.randn((8, 64, 16, 16), generator=generator(0, "maps")) * spread + shift).to(torch.bfloat16)
        weight, bias = torch.ones(64), torch.zeros(64)
        exact = torch.nn.functional.group_norm(maps.float(), groups, weight, bias)
        low = torch.nn.functional.group_norm(maps, groups, weight.to(torch.bfloat16), bias.to(torch.bfloat16))
        assert low.dtype == torch.bfloat16
        # The result alone is rounded: half a unit in the last of 8 bits.
        torch.testing.assert_close(low.float(), exact, rtol=2**-8, atol=2**-8)


def test_layout_of_real_images_is_a_choice_on_a_gpu_alone() -> None:
    execution = Execution(chunk=7, block=3, recompute=False, compiled=False)
    for asked in (False, True):
        laid = for_inference(colour(2), execution, channels_last=asked)
        assert laid.is_contiguous(memory_format=torch.channels_last)
        compiled = replace(execution, compiled=True)
        assert for_inference(colour(2), compiled, channels_last=asked).is_contiguous()
