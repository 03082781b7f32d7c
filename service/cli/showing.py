"""How one job is printed."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from service.cli.terminal import as_json, results
from service.cli.words import in_commands
from service.replies import Job

TITLE_WIDTH = 10
NEWLINE, BREAK = "\n", "\n" + (TITLE_WIDTH + 2) * " "


def show_job(job: Job, json: bool) -> None:
    """Print its state, its figures, or why it failed."""
    if json:
        as_json(job.model_dump(mode="json"))
        return
    for title, text in _lines(job):
        # Not wrapped here: a terminal that wraps a line by itself still has the address in it as one piece.
        results.print(f" {title:{TITLE_WIDTH}} {text.replace(NEWLINE, BREAK)}", markup=False)
    if job.result is not None:
        results.print(accuracy_table(job))


def _lines(job: Job) -> Iterator[tuple[str, str]]:
    yield "id", job.id
    yield "job", job.title
    yield "state", f"{job.state} ({job.reason})" if job.reason else job.state
    if job.queue is not None:
        why = f": {in_commands(job.queue.message)}" if job.queue.message else ""
        yield "queue", f"place {job.queue.position}, priority {job.priority}{why}"
    if job.labels:
        yield "labels", ", ".join(f"{name}={value}" for name, value in job.labels.items())
    if job.progress and not job.is_final:
        left = f", about {job.progress.eta_seconds:.0f} s left" if job.progress.eta_seconds is not None else ""
        yield "stage", f"{job.progress.stage} {job.progress.count}{left}"
        if job.progress.job_count:
            yield "whole job", job.progress.job_count
    if job.state == "failed":
        yield "error", in_commands(job.complaint)
    elif job.message and job.queue is None:
        yield "message", in_commands(job.message)
    if job.mlflow_url:
        yield "MLflow", job.mlflow_url


def accuracy_table(job: Job) -> Table:
    """The figures of a finished job."""
    table = Table("trained on", "accuracy %", "students", title=f"{job.title}, last epoch", title_justify="left")
    rows = {
        "distilled": "the distilled set",
        "random_real": "random real images, as many",
        "herding": "real images chosen by herding, as many",
        "k_center": "real images chosen by k-center, as many",
        "full": "the full data",
    }
    for name, title in rows.items():
        figure = getattr(job.result, name)
        if figure is not None:
            spread = "" if figure.std is None else f" +- {figure.std:.1f}"
            table.add_row(title, f"{figure.mean:.1f}{spread}", str(figure.n))
    if job.result is not None and job.result.label_robust_score is not None:
        table.caption = f"label-robust score (DD-Ranking): {job.result.label_robust_score:.3f}"
    return table
