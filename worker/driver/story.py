"""What MLflow should hold of a job, read from its stored results. Light."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import cast

from pydantic import JsonValue

from ncfm_core.errors import DamagedError
from ncfm_core.spec import JobSpec
from worker.driver.live import Rows, Story, TrialRecord
from worker.evidence import Evidence, Results, evidence
from worker.history import HISTORY_FILE, Picture, picture_step, read_history
from worker.plan import Build, Plan
from worker.records import StageResult
from worker.storage import Storage
from worker.trials import BEST_FILE, TRIALS_FILE, read_trials

RATES = ("steps_per_second", "images_per_second", "peak_memory_bytes")


def metric_prefix(build: Build) -> str:
    """In front of the names of a result's metrics."""
    match build.kind:
        case "teacher":
            return f"{'search/' if build.held_out else ''}teachers/{build.index}/"
        case "evaluation":
            return f"evaluate/{build.index}/distilled/"
        case "random_real" | "herding" | "k_center":
            return f"evaluate/{build.index}/{build.kind}/"
        case "full_data":
            return "evaluate/full_data/"
        case _:
            return f"{build.stage}/"


def result_file(storage: Storage, result: StageResult, name: str) -> bytes:
    """A file of a result by its name, verified."""
    return storage.read_file(next(file for file in result.files if file.name == name))


def search_method(searched: StageResult) -> Mapping[str, JsonValue]:
    """The fields of the method that a search found, by name."""
    return cast(Mapping[str, JsonValue], searched.figures["best"])


def trial_records(storage: Storage, searched: StageResult) -> list[TrialRecord]:
    """The trials of a search."""
    trials = read_trials(result_file(storage, searched, TRIALS_FILE))
    furthest = max(trial.rungs() for trial in trials)
    return [
        TrialRecord(index=each.index, params=each.params, rows=each.rows, finished=each.rungs() == furthest)
        for each in trials
    ]


def tell(storage: Storage, plan: Plan, results: Results, *, searched: StageResult | None, spec: JobSpec) -> Story:
    """The whole story: curves and costs of every build, grids of the set, the headline figures and the published files.

    Args:
        storage: where the files are.
        plan: of the job, with the key that its set came out with.
        results: all that it names.
        searched: the search's, where there was one.
        spec: as it was run: with the method that the search found.

    Raises:
        DamagedError: a file is missing or damaged.
    """
    found, published = evidence(plan, results), results[str(plan.publish.key)]
    rows: Rows = []
    for build in plan.builds():
        rows += _rows(storage, metric_prefix(build), results[str(build.key)])
    rows += _headline(found, published, spec)
    rows += _scores(found, published, spec)
    files = {file.name: storage.read_file(file) for file in published.files}
    if searched is not None:
        files[BEST_FILE] = result_file(storage, searched, BEST_FILE)
    tags = {"ncfm.distill_key": found.distilled.key, "ncfm.device": str(found.distilled.environment["device"])}
    if found.shortened is not None:
        tags["ncfm.shortened"] = f"step {found.shortened.step} of {found.shortened.steps}"
    return Story(
        rows=rows,
        pictures=list(_pictures(storage, found.distilled)),
        trials=trial_records(storage, searched) if searched else (),
        files=files,
        tags=tags,
    )


def tell_some(storage: Storage, builds: Iterable[Build], results: Results) -> Rows:
    """Curves and costs of what there is of a job that did not come to its end; what is damaged is left out."""
    rows: Rows = []
    for build in builds:
        if (result := results.get(str(build.key))) is not None:
            with suppress(DamagedError):
                rows += _rows(storage, metric_prefix(build), result)
    return rows


def _rows(storage: Storage, prefix: str, result: StageResult) -> Rows:
    """The result's history, and what it cost as a single value each."""
    time = float(round(result.created_at.timestamp() * 1000))
    costs = {name: float(str(result.figures[name])) for name in RATES if name in result.figures}
    rows: Rows = [(prefix, {"step": 0.0, "time": time, "seconds": result.seconds} | costs)]
    if any(file.name == HISTORY_FILE for file in result.files):
        rows += [(prefix, row) for row in read_history(result_file(storage, result, HISTORY_FILE)).rows]
    return rows


def _headline(evidence: Evidence, published: StageResult, spec: JobSpec) -> Iterator[tuple[str, dict[str, float]]]:
    figures = evidence.figures(spec)
    time = float(round(published.created_at.timestamp() * 1000))
    for name, accuracy in (
        ("distilled", figures.distilled),
        ("random_real", figures.random_real),
        ("herding", figures.herding),
        ("k_center", figures.k_center),
        ("full_data", figures.full),
    ):
        if accuracy is not None:
            spread = {} if accuracy.std is None else {f"{name}_std": accuracy.std}
            yield "accuracy/", {"step": 0.0, "time": time, name: accuracy.mean} | spread


def _scores(evidence: Evidence, published: StageResult, spec: JobSpec) -> Iterator[tuple[str, dict[str, float]]]:
    """The label-robust score of every evaluation that has one; that of the first also stands alone."""
    time = float(round(published.created_at.timestamp() * 1000))
    for index, score in enumerate(evidence.scores(spec)):
        if score is not None:
            row = {"step": 0.0, "time": time, "label_robust_score": score.score}
            yield f"evaluate/{index}/", row
            if index == 0:
                yield "", row


def _pictures(storage: Storage, distilled: StageResult) -> Iterator[Picture]:
    for file in distilled.files:
        if (step := picture_step(file.name)) is not None:
            yield Picture(step, storage.read_file(file))
