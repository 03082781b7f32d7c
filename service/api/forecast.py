"""What a job would do, without making one: its stages, which of them are stored already, and how long the rest would take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter
from pydantic import JsonValue

from ncfm_core import cost
from ncfm_core.catalog import DatasetFacts
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from service.api.advice import warnings_for
from service.api.context import StorageDep, StoreDep
from service.api.envelope import split
from service.api.models import Body
from service.api.openapi import SUBMISSION, problems
from service.api.sources import SourcesDep
from service.api.submission import SubmissionDep
from service.listing import same_data
from service.store import Sighting, Store
from worker.plan import Build, held_out, operations_of, plan
from worker.records import attempt_path, result_path
from worker.storage import Storage

router = APIRouter(tags=["jobs"])

LOOKED_AT = 20
"""Earlier jobs on the same data set whose word on the data is looked for."""
NOT_INSPECTED = "unknown until inspected: no earlier job has told the digest of these data"
NOT_SEARCHED = "unknown until searched: the search chooses the method"


class StageForecast(Body):
    """One result that a job would need."""

    stage: str
    name: str
    key: str | None
    """Content key of the result; null while it is not known."""
    state: Literal["cached", "missing", "unknown"]
    why: str


class Estimate(Body):
    """How long a job would take."""

    available: Literal[True] = True
    seconds: float
    """From the start of its driver to its end; what the queue takes is not in it."""
    text: str
    basis: str
    """What it rests on."""


class NoEstimate(Body):
    """Why it cannot be said how long a job would take."""

    available: Literal[False] = False
    reason: str


class Forecast(Body):
    """What would become of a submission."""

    spec: dict[str, JsonValue]
    """Resolved: every default filled in."""
    digest: str
    """Of the resolved spec."""
    stages: list[StageForecast]
    estimate: Estimate | NoEstimate
    warnings: tuple[str, ...]


@router.post(
    "/jobs/validate",
    responses=problems(400, 413, 415, 422, 503),
    openapi_extra=SUBMISSION,
    summary="Try a submission",
)
def validate_job(document: SubmissionDep, store: StoreDep, storage: StorageDep, sources: SourcesDep) -> Forecast:
    """What would become of a submission. Nothing is kept."""
    _, requested = split(document)
    sources.check(document)
    spec = resolve(requested)
    sighting, facts = store.sighting(), sources.facts(spec)
    builds = list(_builds(spec, storage, known_data(store, storage, spec)))
    return Forecast(
        spec=spec.document(),
        digest=spec.digest(),
        stages=[stage for stage, _ in builds],
        estimate=_estimate(spec, facts, sighting, builds),
        warnings=warnings_for(spec, facts, sighting),
    )


def known_data(store: Store, storage: Storage, spec: JobSpec) -> tuple[str, str | None, str] | None:
    """Digests of the data and of their split for a search, and the job that told them; None where none has.

    Data behind an address may have been changed since: the job itself looks at them anew.
    """
    wanted, split_of = spec.dataset.model_dump(mode="json"), held_out(spec)
    found: tuple[str, str | None, str] | None = None
    for job_id, attempt, document in same_data(store, spec.dataset.name, limit=LOOKED_AT):
        if document.get("dataset") != wanted:
            continue
        facts = _facts(storage, job_id, attempt)
        digest = facts.get("digest")
        if not isinstance(digest, str):
            continue
        split_digest = facts.get("held_out_digest")
        is_same_split = split_of is not None and _split_of(document) == split_of and isinstance(split_digest, str)
        if split_of is None or is_same_split:
            return digest, str(split_digest) if is_same_split else None, job_id
        found = found or (digest, None, job_id)
    return found


def _facts(storage: Storage, job_id: str, attempt: int) -> dict[str, JsonValue]:
    """What the inspection of an attempt has found."""
    data = storage.get(attempt_path(job_id, attempt, "result.json"))
    try:
        facts = json.loads(data or b"{}").get("data")
    except (ValueError, AttributeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _split_of(document: dict[str, JsonValue]) -> tuple[JsonValue, JsonValue] | None:
    """The split of an earlier job's search, as `worker.plan.held_out` has it."""
    search, teachers = document.get("search"), document.get("teachers")
    if not (isinstance(search, dict) and isinstance(teachers, dict)):
        return None
    return search.get("validation_fraction"), teachers.get("seed")


def _builds(
    spec: JobSpec, storage: Storage, data: tuple[str, str | None, str] | None
) -> Iterator[tuple[StageForecast, Build | None]]:
    """What a job needs, with what becomes of it; the look at the data is no result."""
    digest, split_digest, told_by = data or (None, None, "")
    why = f"its digest as job {told_by} found it" if data else "every attempt looks at the data first"
    yield StageForecast(stage="inspect", name="data", key=None, state="missing", why=why), None
    for build in plan(spec, digest, held_out_digest=split_digest).builds():
        unknown = NOT_INSPECTED if digest is None or build.held_out else NOT_SEARCHED
        yield _forecast(build, storage, unknown), build


def _forecast(build: Build, storage: Storage, unknown: str) -> StageForecast:
    if build.key is None:
        return StageForecast(stage=build.stage, name=build.label, key=None, state="unknown", why=unknown)
    if storage.size(result_path(build.key)) is None:
        return StageForecast(stage=build.stage, name=build.label, key=build.key, state="missing", why="to be computed")
    return StageForecast(stage=build.stage, name=build.label, key=build.key, state="cached", why="stored already")


def _estimate(
    spec: JobSpec,
    facts: DatasetFacts,
    sighting: Sighting | None,
    builds: list[tuple[StageForecast, Build | None]],
) -> Estimate | NoEstimate:
    results = [(stage, build) for stage, build in builds if build is not None]
    left = [build for stage, build in results if stage.state != "cached"]
    if not left:
        text = f"about {cost.START_SECONDS:.0f} seconds to start: everything is stored already"
        return Estimate(seconds=cost.START_SECONDS, text=text, basis="the results in the storage root")
    if sighting is None or sighting.cpus is None or sighting.gpus is None:
        return NoEstimate(reason="no cluster has been seen yet, so it is not known where the job would run")
    if facts.assumed:
        return NoEstimate(reason=f"the number of images of {spec.dataset.name} is not known before they are counted")
    each, stages = cost.costs(spec, facts), len({build.stage for build in left})
    work = sum(operations_of(build, each) for build in left)
    found = cost.estimate(spec, cpus=sighting.cpus, gpus=sighting.gpus, facts=facts, work=work, stages=stages)
    counted = "the spec and the images of the upload" if spec.dataset.facts.assumed else "the spec"
    stored = f", without those of {len(results) - len(left)} stored results" if len(left) < len(results) else ""
    start = cost.START_SECONDS + cost.STAGE_SECONDS * stages
    basis = f"operations counted from {counted}{stored}, at typical rates of {sighting.cpus:g} CPUs and {sighting.gpus:g} GPUs"
    basis += f"; {start:.0f} s for starting the job and its stages; good to a factor of three on quiet machines"
    return Estimate(seconds=round(found.seconds, 1), text=found.text, basis=basis)
