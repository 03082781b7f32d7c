"""What MLflow lacks of an attempt that has ended, from the storage root: for a server that was away then. No Ray, no torch.

Every call may be made again: a run that is complete stays as it is, and one that was half-told is told to its end.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from ncfm_core.errors import DamagedError, SpecError
from ncfm_core.spec import JobSpec
from worker.driver.live import RUN_STATUS, Rows, RunIdentity, Story, identity_of, parts_of
from worker.driver.story import search_method, tell, tell_some
from worker.evidence import Results
from worker.plan import Plan, plan
from worker.records import AttemptResult, StageResult, attempt_path
from worker.settings import Surroundings, prepare_tracking
from worker.site import DataFacts
from worker.storage import Storage
from worker.trials import best_spec


def publish(
    spec: JobSpec, job_id: str, attempt: int, *, status: str | None, storage: Storage, surroundings: Surroundings
) -> None:
    """Complete the run of a job, and end it.

    An attempt that succeeded gets a run if it has none; of any other only what exists is brought to its end.

    Args:
        spec: of the job, resolved.
        job_id: of the job.
        attempt: whose result is published.
        status: of the run; None for what the attempt came to.
        storage: the root.
        surroundings: with the MLflow server.

    Raises:
        TrackingError: the server is away; it can be tried again.
        SpecError: there is nothing to publish, or no server.
        DamagedError: a stored result is missing or damaged.
    """
    if not surroundings.mlflow_url:
        raise SpecError.of("mlflow_url", None, "no MLflow server is named", "Set NCFM_MLFLOW_URL, or give --mlflow.")
    result = storage.get_record(attempt_path(job_id, attempt, "result.json"), AttemptResult)
    if status is None:
        if result is None:
            raise SpecError.of("--attempt", attempt, "has left no result", "Name the end of its run with --status.")
        status = RUN_STATUS[result.outcome]
    prepare_tracking()
    identity = identity_of(spec, job_id, attempt)
    told = _told(storage, spec, result) if result is not None else None
    _send(surroundings, identity, told, spec=spec, result=result, status=status)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What is stored of an attempt."""

    facts: DataFacts | None
    story: Story | None
    """Of one that succeeded."""
    rows: Rows
    """Of any other: what there is."""


def _send(
    surroundings: Surroundings,
    identity: RunIdentity,
    told: _Told | None,
    *,
    spec: JobSpec,
    result: AttemptResult | None,
    status: str,
) -> None:
    from worker.tracking import MlflowRun, has_run  # MLflow, once there is something to say

    url = surroundings.mlflow_url
    story = told.story if told else None
    if story is None and not has_run(url, identity):
        return
    run = MlflowRun(url, surroundings.mlflow_public_url or url, identity, is_live=False)
    if told is not None:
        if told.facts is not None:
            run.log_data(spec.dataset, told.facts.digest, told.facts.model_dump(mode="json"))
        for send in parts_of(run, story) if story else (lambda: run.log_rows(told.rows),):
            send()
    run.close(status, ended_at=result.finished_at if result else None)


def _told(storage: Storage, spec: JobSpec, result: AttemptResult) -> _Told:
    """Read it all before anything is sent."""
    if result.data is None:
        return _Told(facts=None, story=None, rows=[])
    facts = DataFacts.model_validate(result.data)
    results = {key: found for key in result.keys if (found := _found(storage, key)) is not None}
    searched, run_spec, needed = _planned(spec, facts, results, result)
    if result.outcome != "succeeded":
        return _Told(facts=facts, story=None, rows=tell_some(storage, needed.builds(), results))
    if missing := [build for build in needed.builds() if build.key not in results]:
        raise DamagedError.of(
            str(missing[0].key), None, f"the result of {missing[0].label} is gone", "Run the job again."
        )
    return _Told(facts=facts, story=tell(storage, needed, results, searched=searched, spec=run_spec), rows=[])


def _found(storage: Storage, key: str) -> StageResult | None:
    with suppress(DamagedError):
        return storage.find_result(key)
    return None


def _planned(
    spec: JobSpec, facts: DataFacts, results: Results, result: AttemptResult
) -> tuple[StageResult | None, JobSpec, Plan]:
    """The search's result if there is one, the spec as it was run, and its plan with the keys that came out."""
    asked = plan(spec, facts.digest, held_out_digest=facts.held_out_digest)
    searched = results.get(str(asked.search.key)) if asked.search else None
    if asked.search and searched is None:
        return None, spec, asked
    run_spec = best_spec(spec, search_method(searched)) if searched else spec
    needed = plan(run_spec, facts.digest, cut_at=result.shortened.step if result.shortened else None)
    return searched, run_spec, replace(needed, search=asked.search, search_teachers=asked.search_teachers)
