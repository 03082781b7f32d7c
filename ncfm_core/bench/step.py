"""`bench step`: how long one update of the images takes, and where the time goes."""

from __future__ import annotations

import statistics
import time

import torch

from ncfm_core.bench.machine import held_mib, peak_mib, reset_peak, synchronise
from ncfm_core.bench.parts import profiled
from ncfm_core.bench.work import Work
from ncfm_core.distill import Distillation
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.protocols import Document
from ncfm_core.spec import NcfmSpec

WINDOWS = {"cpu": 3, "cuda": 40}
"""Reuse windows that are measured where nothing is said."""
WARMUP = {"cpu": 1, "cuda": 5}
"""Windows before that, which compile, choose algorithms and fill caches."""


def bench_step(work: Work, *, steps: int | None, warmup: int | None) -> Document:
    """Time image steps.

    What repeats is a window of `reuse` steps (one draw, then its updates), so that is what is timed, and divided by their number.

    Args:
        work: what is measured.
        steps: image steps to measure, rounded up to whole windows.
        warmup: image steps before those, likewise; at least one window.
    """
    spec, device = work.spec, work.device
    reuse = spec.method.reuse
    windows = WINDOWS[device.type] if steps is None else -(-steps // reuse)
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
    )
    baseline = held_mib(device)
    reset_peak(device)
    first, *_ = [_window_seconds(run, reuse, device) for _ in range(before)]
    times = [_window_seconds(run, reuse, device) for _ in range(windows)]
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
        "image_steps": windows * reuse,
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
        ).result()
        for index in range(teachers.count)
    ]


def _window_seconds(run: Distillation, reuse: int, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    _advance(run, reuse, device)
    return time.perf_counter() - started


def _advance(run: Distillation, reuse: int, device: torch.device) -> None:
    for _ in run.run(until=run.step + reuse):
        pass
    synchronise(device)
