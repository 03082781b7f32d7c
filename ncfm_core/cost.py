"""What a job will roughly cost before it runs: operations counted from the spec, over a typical rate. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ncfm_core.geometry import convolutions, num_features
from ncfm_core.protocols import RATE_FRACTION
from ncfm_core.spec import JobSpec, ModelSpec, TrainingSpec

CPU_RATE = 80e9
"""Operations a second and core: ConvNet-3 in float32 on a server core makes 48e9 (distilling at width 32, uncompiled) to 154e9
(training at width 128)."""
GPU_RATE = 15e12
"""Operations a second on one data-centre GPU, launches included."""
BACKWARD = 2.0
"""A backward pass in units of the forward one."""
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rough figure, good to a factor of three."""

    seconds: float
    text: str
    """The same in words, such as `about 6 days on 2 CPU cores`."""


def estimate(spec: JobSpec, *, cpus: float, gpus: float) -> Estimate:
    """Wall time of a job whose results are not in the storage yet.

    Args:
        spec: what would run.
        cpus: cores of the cluster it would run on.
        gpus: GPUs of that cluster.
    """
    wants_gpu = spec.resources.gpus == "auto" or spec.resources.gpus > 0
    on_gpu = wants_gpu and gpus > 0
    cores = max(1.0, min(float(spec.resources.cpus), cpus))
    seconds = operations(spec) / (GPU_RATE if on_gpu else CPU_RATE * cores)
    where = "one GPU" if on_gpu else f"{cores:g} CPU core{'s' if cores > 1 else ''}"
    facts = spec.dataset.facts
    basis = f", if the data are about {facts.num_classes} classes and {facts.num_train} images" if facts.assumed else ""
    return Estimate(seconds, f"about {_in_words(seconds)} on {where}{basis}")


def operations(spec: JobSpec) -> float:
    """Floating-point operations of teachers, search, distillation and evaluations together."""
    facts, method = spec.dataset.facts, spec.method
    decoded = facts.num_classes * spec.ipc * method.factor**2
    teacher = _training(spec.model, spec.teachers.training, facts.image_size, facts.channels, facts.num_train)
    total = spec.teachers.count * teacher + method.steps * _step(spec)
    for evaluation in spec.evaluate:
        student = _training(evaluation.model, evaluation.training, facts.image_size, facts.channels, decoded)
        test = evaluation.tests * facts.num_test * forward(evaluation.model, facts.image_size, facts.channels)
        judged = 1 + len(spec.baselines)
        held_out = RATE_FRACTION * facts.num_train * forward(evaluation.model, facts.image_size, facts.channels)
        total += judged * evaluation.students * (student + test)
        total += judged * len(evaluation.lr_grid) * (student + held_out)
    full = spec.full_data
    total += full.students * _training(
        spec.evaluate[0].model, full.training, facts.image_size, facts.channels, facts.num_train
    )
    if spec.search:
        total += spec.search.trials * spec.search.steps * _step(spec)
    return total


def forward(model: ModelSpec, image_size: int, channels: int) -> float:
    """Operations of one image going forward through the convolutions (two for a multiply and add)."""
    return float(sum(each.operations for each in convolutions(model, image_size, channels)))


def _training(model: ModelSpec, training: TrainingSpec, image_size: int, channels: int, images: int) -> float:
    return (1 + BACKWARD) * training.epochs * images * forward(model, image_size, channels)


def _step(spec: JobSpec) -> float:
    """One update of the images: the share of a draw, then matching and calibration of the decoded images."""
    facts, method, model = spec.dataset.facts, spec.method, spec.model
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
