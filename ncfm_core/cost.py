"""What a job will roughly cost before it runs: operations counted from the spec, over a typical rate. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ncfm_core.catalog import DatasetFacts
from ncfm_core.geometry import convolutions, num_features
from ncfm_core.protocols import RATE_FRACTION
from ncfm_core.spec import EvaluationSpec, JobSpec, ModelSpec, TrainingSpec

CPU_RATE = 80e9
"""Operations a second and core: ConvNet-3 in float32 on a server core makes 48e9 (distilling at width 32, uncompiled) to 154e9
(training at width 128)."""
GPU_RATE = 15e12
"""Operations a second on one data-centre GPU, launches included."""
BACKWARD = 2.0
"""A backward pass in units of the forward one."""
DAY_SECONDS = 86_400


START_SECONDS = 12.0
"""From the start of a driver to its first stage, the data looked at: a job whose every result is stored takes 9 s on two quiet
cores (docs/performance.md)."""
STAGE_SECONDS = 3.0
"""What a stage's process takes to start and to end, on a quiet machine. With it the job of `ncfm demo`, five seconds of
operations in four stages, comes to 29 s; it takes 32 to 34 (docs/performance.md). Jobs of seconds take 15 to 25 beside theirs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rough figure, good to a factor of three."""

    seconds: float
    text: str
    """The same in words, such as `about 6 days on 2 CPU cores`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Floating-point operations of each result of a job."""

    teacher: float
    """One of them."""
    search: float
    """Its trials, without its teachers."""
    distill: float
    judged: tuple[float, ...]
    """One set, or one baseline, by each evaluation of the spec."""
    full_data: float


def estimate(
    spec: JobSpec,
    *,
    cpus: float,
    gpus: float,
    facts: DatasetFacts | None = None,
    work: float | None = None,
    stages: int = 4,
) -> Estimate:
    """Wall time of a job, with its start.

    Args:
        spec: what would run.
        cpus: cores of the cluster it would run on.
        gpus: GPUs of that cluster.
        facts: of the data; None for what the spec alone says of them.
        work: operations that are to be done; None where no result is in the storage yet.
        stages: that have something to do.
    """
    facts = facts or spec.dataset.facts
    work = operations(spec, facts) if work is None else work
    seconds = START_SECONDS + STAGE_SECONDS * stages + work / rate(spec, cpus=cpus, gpus=gpus)
    cores = _cores(spec, cpus)
    where = "one GPU" if _on_gpu(spec, gpus) else f"{cores:g} CPU core{'s' if cores > 1 else ''}"
    basis = f", if the data are about {facts.num_classes} classes and {facts.num_train} images" if facts.assumed else ""
    return Estimate(seconds, f"about {_in_words(seconds)} on {where}{basis}")


def rate(spec: JobSpec, *, cpus: float, gpus: float) -> float:
    """Operations a second of a job's tasks on a cluster with so many cores and GPUs."""
    return GPU_RATE if _on_gpu(spec, gpus) else CPU_RATE * _cores(spec, cpus)


def _on_gpu(spec: JobSpec, gpus: float) -> bool:
    return gpus > 0 and (spec.resources.gpus == "auto" or spec.resources.gpus > 0)


def _cores(spec: JobSpec, cpus: float) -> float:
    return max(1.0, min(float(spec.resources.cpus), cpus))


def operations(spec: JobSpec, facts: DatasetFacts | None = None) -> float:
    """Floating-point operations of teachers, search, distillation and evaluations together."""
    each = costs(spec, facts)
    teachers = spec.teachers.count * (2 if spec.search else 1)
    judged = (1 + len(spec.baselines)) * sum(each.judged)
    return teachers * each.teacher + each.search + each.distill + judged + each.full_data


def costs(spec: JobSpec, facts: DatasetFacts | None = None) -> Costs:
    """What each result of a job costs.

    Args:
        spec: of the job.
        facts: of the data; None for what the spec alone says of them.
    """
    facts = facts or spec.dataset.facts
    step, full = _step(spec, facts), spec.full_data
    return Costs(
        teacher=_training(spec.model, spec.teachers.training, facts, facts.num_train),
        search=spec.search.trials * spec.search.steps * step if spec.search else 0.0,
        distill=spec.method.steps * step,
        judged=tuple(_judged(spec, evaluation, facts) for evaluation in spec.evaluate),
        full_data=full.students * _training(spec.evaluate[0].model, full.training, facts, facts.num_train),
    )


def _judged(spec: JobSpec, evaluation: EvaluationSpec, facts: DatasetFacts) -> float:
    """Students on one set, and those that its rate is chosen by."""
    decoded = facts.num_classes * spec.ipc * spec.method.factor**2
    look = forward(evaluation.model, facts.image_size, facts.channels)
    student = _training(evaluation.model, evaluation.training, facts, decoded)
    students = evaluation.students * (student + evaluation.tests * facts.num_test * look)
    return students + len(evaluation.lr_grid) * (student + RATE_FRACTION * facts.num_train * look)


def forward(model: ModelSpec, image_size: int, channels: int) -> float:
    """Operations of one image going forward through the convolutions (two for a multiply and add)."""
    return float(sum(each.operations for each in convolutions(model, image_size, channels)))


def _training(model: ModelSpec, training: TrainingSpec, facts: DatasetFacts, images: int) -> float:
    return (1 + BACKWARD) * training.epochs * images * forward(model, facts.image_size, facts.channels)


def _step(spec: JobSpec, facts: DatasetFacts) -> float:
    """One update of the images: the share of a draw, then matching and calibration of the decoded images."""
    method, model = spec.method, spec.model
    products = 2 * method.num_frequencies * num_features(model, facts.image_size)
    image = forward(model, facts.image_size, facts.channels)
    decoded = facts.num_classes * spec.ipc * method.factor**2
    real = facts.num_classes * min(method.real_batch, facts.smallest_class)
    ascent = (1 + BACKWARD) * method.sampler_steps * products if method.sampler == "scale_mixture" else 0.0
    draw = real * (image + products + ascent) + decoded * (image + ascent)
    return draw / method.reuse + decoded * (1 + BACKWARD) * (2 * image + products)


def _in_words(seconds: float) -> str:
    for unit, length in (("day", DAY_SECONDS), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            amount = round(seconds / length, 1)
            return f"{amount:g} {unit}{'' if amount == 1 else 's'}"
    return f"{max(1, round(seconds))} seconds"
