"""What a submitter should know before the job runs: how long it would take where it would run, and what no network sees."""

from __future__ import annotations

from ncfm_core.catalog import DatasetFacts
from ncfm_core.cost import DAY_SECONDS, estimate
from ncfm_core.geometry import whole_sizes
from ncfm_core.spec import JobSpec
from service.api.health import is_silent
from service.store import Sighting


def awaited_by_new(sighting: Sighting | None) -> str:
    """What a job that has just been kept waits for, with the way out; the controller says more once it has looked.

    Args:
        sighting: what the controller last saw.
    """
    start = "start one with `ncfm controller` (`ncfm up` starts all)"
    if sighting is None:
        return f"waits for a controller, of which none has looked yet: {start}"
    if is_silent(sighting):
        return f"waits for a controller, of which none has looked since {sighting.checked_at:%Y-%m-%d %H:%M:%S} UTC: {start}"
    if sighting.seen_at is None or sighting.ray_error:
        return "waits for Ray, which the controller has not reached when it last looked: GET /cluster says why"
    return "waits for the controller's next look, a matter of seconds; GET /cluster says when it last looked"


def warnings_for(spec: JobSpec, facts: DatasetFacts, sighting: Sighting | None) -> tuple[str, ...]:
    """Warnings to keep with the job: where it would plainly take more than a day, and where pools leave out rows of maps.

    Args:
        spec: the resolved spec.
        facts: what is known of its data.
        sighting: what the controller last saw of the cluster; before that, CPUs alone are assumed.
    """
    return (*_long(spec, facts, sighting), *_left_out(spec, facts.image_size))


def _long(spec: JobSpec, facts: DatasetFacts, sighting: Sighting | None) -> tuple[str, ...]:
    cpus, gpus, assumed = float(spec.resources.cpus), 0.0, " (no cluster seen yet, so CPUs are assumed)"
    if sighting is not None and sighting.cpus is not None and sighting.gpus is not None:
        cpus, gpus, assumed = sighting.cpus, sighting.gpus, ""
    cost = estimate(spec, cpus=cpus, gpus=gpus, facts=facts)
    if cost.seconds <= DAY_SECONDS:
        return ()
    way_out = "" if spec.preset == "quick" else " `preset: quick` takes a small part of that."
    return (f"This will take {cost.text}{assumed}, by a rough estimate.{way_out}",)


def _left_out(spec: JobSpec, image_size: int) -> tuple[str, ...]:
    """One for each network that is not the job's own again."""
    models = {"model": spec.model}
    for number, entry in enumerate(spec.evaluate):
        if entry.model not in models.values():
            models[f"evaluate.{number}.model"] = entry.model
    return tuple(
        f"{where}: the pools of {model.label} round down and leave out rows and columns of images of {image_size} pixels; "
        f"{' or '.join(map(str, sizes))} pixels would lose nothing."
        for where, model in models.items()
        if (sizes := whole_sizes(model, image_size))
    )
