"""`bench step`: how long one update of the images takes, and where the time goes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ncfm_core.bench.machine import held_mib, peak_mib, reset_peak, synchronise
from ncfm_core.bench.parts import profiled
from ncfm_core.bench.work import Work
from ncfm_core.distill import Distillation
from ncfm_core.errors import SpecError
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.protocols import Document
from ncfm_core.spec import NcfmSpec

STEPS_IN_GROUP = {"cpu": 1, "cuda": 20}
"""Least image steps between two waits for the device. On a GPU the CPU draws and launches while older steps compute, as in a real
run: to wait after each window would measure a machine that does one or the other."""
GROUPS = {"cpu": 3, "cuda": 5}
"""Groups of windows that are measured where nothing is said; on a CPU a group is one window."""
WARMUP = {"cpu": 1, "cuda": 5}
"""Windows before that, which compile, choose algorithms and fill caches."""


def bench_step(
    work: Work, *, steps: int | None, warmup: int | None, matmul_tf32: bool = False, channels_last: bool = False
) -> Document:
    """Time image steps.

    What repeats is a window of `reuse` steps (one draw, then its updates); groups of whole windows are timed, and divided by the
    number of their steps.

    Args:
        work: what is measured.
        steps: image steps to measure, rounded up to whole groups.
        warmup: image steps before those, rounded up to whole windows; at least one window.
        matmul_tf32: whether products on a GPU may round float32 to TF32, as convolutions do.
        channels_last: whether real images go through a network on a GPU in that layout.

    Raises:
        SpecError: a choice for a GPU, and there is none.
    """
    for option, chosen in (("--matmul-tf32", matmul_tf32), ("--channels-last", channels_last)):
        if chosen and work.device.type != "cuda":
            raise SpecError.of(option, None, "is a choice for a GPU", "Leave it out, or name --device cuda.")
    with _tf32_products(work.device, matmul_tf32):
        return _measured(work, steps, warmup, channels_last) | {"channels_last": channels_last}


def grouping(kind: str, *, reuse: int, steps: int | None) -> tuple[int, int]:
    """Windows in a group, and how many groups, for image steps to measure on a kind of device."""
    windows = max(1, -(-STEPS_IN_GROUP[kind] // reuse))
    return windows, GROUPS[kind] if steps is None else max(1, -(-steps // (windows * reuse)))


def _measured(work: Work, steps: int | None, warmup: int | None, channels_last: bool) -> Document:
    spec, device = work.spec, work.device
    reuse = spec.method.reuse
    windows, groups = grouping(device.type, reuse=reuse, steps=steps)
    before = WARMUP[device.type] if warmup is None else max(1, -(-warmup // reuse))
    dataset = work.dataset.to(device)
    pool = TeacherPool(spec.model, dataset, _fresh_teachers(work), device)
    run = Distillation(
        dataset,
        pool,
        spec.method,
        ipc=spec.ipc,
        seed=spec.seed,
        device=device,
        memory_limit=work.memory_limit,
        compiled=work.compiled,
        channels_last=channels_last,
    )
    # A short recipe may have fewer steps than are measured; more of them are as fast.
    run.total = max(run.total, (before + groups * windows + 1) * reuse)
    baseline = held_mib(device)
    reset_peak(device)
    first, *_ = [_seconds(run, reuse, device) for _ in range(before)]
    times = [_seconds(run, windows * reuse, device) / windows for _ in range(groups)]
    peak = peak_mib(device)
    shares = profiled(lambda: _advance(run, reuse, device), device)
    each = [1e3 * seconds / reuse for seconds in times]
    median = statistics.median(each)
    decoded = len(run.synthetic.labels) * spec.method.factor**2
    real = dataset.num_classes * min(spec.method.real_batch, min(dataset.class_counts))
    forwards = image_forwards(spec.method, decoded=decoded, real=real)
    return work.describe() | {
        "bench": "step",
        "networks": "freshly initialised",
        "ms_per_image_step": round(median, 3),
        "ms_min": round(min(each), 3),
        "ms_max": round(max(each), 3),
        "image_steps": groups * windows * reuse,
        "image_forwards": int(forwards) if forwards.is_integer() else round(forwards, 2),
        "images_per_second": round(1e3 * forwards / median, 1),
        "frequencies": 0 if spec.method.discrepancy == "mean" else spec.method.num_frequencies,
        "peak_mib": round(peak, 1),
        "baseline_mib": round(baseline, 1),
        "parts": dict(shares.parts),
        "parts_clock": shares.clock,
        "execution": str(run.execution),
        "compiled": run.execution.compiled,
        "compile_seconds": round(max(0.0, first - median * reuse / 1e3), 1) if run.execution.compiled else 0.0,
        "halved": run.halvings,
    }


def image_forwards(method: NcfmSpec, *, decoded: int, real: int) -> float:
    """Images that go forward through a network per image step; each forward that is repeated to save memory counts once.

    Args:
        method: all of its numbers.
        decoded: synthetic images of all classes, decoded.
        real: real images of all classes in a draw.
    """
    ascent = method.discrepancy == "characteristic" and method.sampler == "scale_mixture"
    shared = real + (decoded if ascent else 0)
    return shared / method.reuse + decoded * (2 if method.calibration_weight else 1)


def _fresh_teachers(work: Work) -> list[dict[str, torch.Tensor]]:
    """Teachers that were never trained: a step is as fast."""
    teachers = work.spec.teachers
    return [
        TeacherTraining(
            work.dataset,
            work.spec.model,
            teachers.training,
            seed=teachers.seed,
            index=index,
            device=torch.device("cpu"),
            # None of them is trained: to look for a compiler would take seconds for nothing.
            compiled=False,
        ).result()
        for index in range(teachers.count)
    ]


@contextmanager
def _tf32_products(device: torch.device, chosen: bool) -> Iterator[None]:
    """As chosen meanwhile; on a CPU nothing is touched, and where it is not chosen the default stays."""
    if device.type != "cuda" or not chosen:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _seconds(run: Distillation, steps: int, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    _advance(run, steps, device)
    return time.perf_counter() - started


def _advance(run: Distillation, steps: int, device: torch.device) -> None:
    # A report waits for the device: here there is one at the end alone, where it is waited for anyway.
    for _ in run.run(until=run.step + steps, report_every=sys.maxsize):
        pass
    synchronise(device)
