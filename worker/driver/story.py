"""What MLflow should hold of a job, read from its stored results. Light."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ncfm_core.spec import JobSpec
from worker.driver.live import Rows, Story
from worker.driver.pool import Results
from worker.evidence import Evidence
from worker.history import HISTORY_FILE, Picture, picture_step, read_history
from worker.plan import Build
from worker.records import StageResult
from worker.storage import Storage

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


def tell(
    storage: Storage,
    builds: Iterable[Build],
    results: Results,
    *,
    evidence: Evidence,
    published: StageResult,
    spec: JobSpec,
) -> Story:
    """The whole story: curves and costs of every build, grids of the set, the headline figures and the published files."""
    rows: Rows = []
    for build in builds:
        result = results[str(build.key)]
        rows += _rows(storage, metric_prefix(build), result)
    rows += _headline(evidence, published, spec)
    rows += _scores(evidence, published, spec)
    return Story(
        rows=rows,
        pictures=list(_pictures(storage, evidence.distilled)),
        trials=(),
        files={file.name: storage.read_file(file) for file in published.files},
        tags={"ncfm.distill_key": evidence.distilled.key, "ncfm.device": str(evidence.distilled.environment["device"])},
    )


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
            yield "accuracy/", {"step": 0.0, "time": time, name: accuracy.mean, f"{name}_std": accuracy.std}


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
