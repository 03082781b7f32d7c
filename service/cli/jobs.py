"""The commands about jobs: submit, ls, show, logs, cancel, pull. They speak to the API and to nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from service.cli.progress_bars import StageBars
from service.cli.terminal import as_json, messages, results
from service.client import Client, ServiceAway
from service.local.state import Home
from service.replies import Job
from service.settings import load_settings
from worker.spec_file import read_document, with_changes

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="NCFM_URL", help="Of the API; the running stack of NCFM_HOME by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, one object.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Of the job; `ncfm ls` lists them.")]


def connect(url: str | None) -> Client:
    """The API that is meant.

    Raises:
        ServiceAway: none is named and no stack runs.
    """
    settings = load_settings()
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if url:
        return Client(url, key=key)
    home = Home(settings.home)
    found = home.status().api
    if found is None:
        raise ServiceAway.of(
            "NCFM_HOME",
            str(home.folder),
            "no stack runs here",
            "Start one with `ncfm up`, or name a service with --url.",
        )
    return Client(found, key=key)


def submit(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC.yaml]", help="YAML or JSON file; - for standard input.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set, such as digits.")] = None,
    ipc: Annotated[int | None, typer.Option(help="Images per class.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field, as method.steps=500.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end; exit code 1 if it fails.")] = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Hand in a job."""
    document = read_document(spec) if spec is not None else {}
    given = {"dataset": dataset, "ipc": ipc}
    document |= {name: value for name, value in given.items() if value is not None}
    document = with_changes(document, settings or [])
    with connect(url) as client:
        job = client.submit(document)
        for warning in job.warnings:
            messages.print(f"warning: {warning}", markup=False)
        if wait:
            messages.print(f"job {job.id}: {job.title}")
            job = follow(client, job)
        _show(job, json)
    if wait and job.state != "succeeded":
        raise typer.Exit(1)


def ls(
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many, newest first.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where to go on: `next` of the page before.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """List jobs."""
    with connect(url) as client:
        jobs, following = client.jobs(limit=limit, cursor=cursor)
    if json:
        as_json({"items": [job.model_dump(mode="json") for job in jobs], "next": following})
        return
    table = Table("id", "job", "state", "stage", "created", box=None)
    for job in jobs:
        stage = job.progress.stage if job.progress and not job.is_final else None
        table.add_row(job.id, job.title, job.state, stage or "", f"{job.created_at:%Y-%m-%d %H:%M}")
    results.print(table)
    if following:
        messages.print(f"more: ncfm ls --cursor {following}")


def show(job_id: JobId, url: Url = None, json: AsJson = False) -> None:
    """Show one job: its state, its figures, or why it failed."""
    with connect(url) as client:
        _show(client.job(job_id), json)


def logs(job_id: JobId, url: Url = None, json: AsJson = False) -> None:
    """Print what the job's driver has printed."""
    with connect(url) as client:
        text = client.logs(job_id)
    if json:
        as_json({"id": job_id, "logs": text})
    else:
        results.print(text, markup=False, end="")


def cancel(job_id: JobId, url: Url = None, json: AsJson = False) -> None:
    """Cancel a job."""
    with connect(url) as client:
        _show(client.cancel(job_id), json)


def pull(
    job_id: JobId,
    dest: Annotated[Path | None, typer.Argument(help="Folder; ./ID by default.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Fetch and check what a job has published."""
    folder = dest if dest is not None else Path(job_id)
    with connect(url) as client:
        files = client.pull(job_id, folder)
    if json:
        as_json({"id": job_id, "folder": str(folder), "files": [str(path) for path in files]})
    else:
        results.print(f"{len(files)} files in {folder}", markup=False)


def follow(client: Client, job: Job) -> Job:
    """Show a bar for each stage until the job has ended."""
    with Progress(*StageBars.columns(), console=messages) as progress:
        bars = StageBars(progress)
        return client.wait(job.id, on_change=bars.update)


def _show(job: Job, json: bool) -> None:
    if json:
        as_json(job.model_dump(mode="json"))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    # Folded, never cut: an address must be whole where somebody copies it.
    table.add_column(overflow="fold")
    table.add_row("id", job.id)
    table.add_row("job", job.title)
    table.add_row("state", f"{job.state} ({job.reason})" if job.reason else job.state)
    if job.progress and not job.is_final:
        table.add_row("progress", f"{job.progress.stage} {job.progress.completed}/{job.progress.total}")
    if job.state == "failed":
        table.add_row("error", job.complaint)
    if job.mlflow_url:
        table.add_row("MLflow", job.mlflow_url)
    results.print(table)
    if job.result is not None:
        results.print(accuracy_table(job))


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
            table.add_row(title, f"{figure.mean:.1f} +- {figure.std:.1f}", str(figure.n))
    if job.result is not None and job.result.label_robust_score is not None:
        table.caption = f"label-robust score (DD-Ranking): {job.result.label_robust_score:.3f}"
    return table


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for command in (submit, ls, show, logs, cancel, pull):
        app.command()(command)
