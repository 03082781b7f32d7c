"""The commands about jobs: hand in, look at, end, fetch. They speak to the API and to nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue
from rich.progress import Progress
from rich.table import Table

from ncfm_core.errors import SpecError
from service.cli.progress_bars import StageBars
from service.cli.terminal import as_json, messages, results
from service.cli.words import in_commands
from service.client import Client, ServiceAway
from service.local.state import Home
from service.replies import Job
from service.replies import Progress as JobProgress
from service.settings import load_settings
from worker.spec_file import read_document, with_changes

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="NCFM_URL", help="Of the API; the running stack of NCFM_HOME by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, one object.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Of the job; `ncfm ls` lists them.")]
Spec = Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="YAML or JSON file; - for standard input.")]
Dataset = Annotated[str | None, typer.Option(help="Data set, such as digits.")]
Ipc = Annotated[int | None, typer.Option(help="Images per class.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field, as method.steps=500.")
]
Priority = Annotated[int | None, typer.Option(help="0 to 100, 50 by default: higher ones go first.")]
NewLabels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="To find it by; repeatable.")]
Key = Annotated[
    str | None, typer.Option("--key", help="Idempotency key: the same request under the same key makes one job.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it to its end; exit code 1 if it fails.")]
EXIT_DETACHED = 130


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
    spec: Spec = None,
    dataset: Dataset = None,
    ipc: Ipc = None,
    settings: Changes = None,
    priority: Priority = None,
    label: NewLabels = None,
    key: Key = None,
    wait: Wait = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Hand in a job."""
    document = _document(spec, dataset, ipc, settings or [])
    given: dict[str, JsonValue] = {"priority": priority, "labels": dict(_labels(label or [])) or None}
    document |= {name: value for name, value in given.items() if value is not None}
    with connect(url) as client:
        _handed_in(client, client.submit(document, key=key), wait=wait, json=json)


def rerun(
    job_id: JobId,
    settings: Changes = None,
    priority: Priority = None,
    label: NewLabels = None,
    key: Key = None,
    wait: Wait = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Hand in a job again, as a new one; --set changes what it asks for."""
    overrides, labels = with_changes({}, settings or []), _labels(label or [])
    with connect(url) as client:
        job = client.rerun(job_id, overrides or None, priority=priority, labels=labels or None, key=key)
        _handed_in(client, job, wait=wait, json=json)


def validate(
    spec: Spec = None,
    dataset: Dataset = None,
    ipc: Ipc = None,
    settings: Changes = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show what would become of a job: its stages, what of them is stored, and how long it would take."""
    document = _document(spec, dataset, ipc, settings or [])
    with connect(url) as client:
        forecast = client.validate(document)
    if json:
        as_json(forecast.model_dump(mode="json"))
        return
    for warning in forecast.warnings:
        messages.print(f"warning: {warning}", markup=False)
    table = Table("stage", "result", "state", "why", box=None)
    for stage in forecast.stages:
        table.add_row(stage.stage, stage.name, stage.state, stage.why)
    results.print(table)
    estimate = forecast.estimate
    results.print(f"estimate: {estimate.text if estimate.available else f'none ({estimate.reason})'}", markup=False)


def ls(
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many, newest first.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where to go on: `next` of the page before.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only those in this state; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only those of this data set.")] = None,
    method: Annotated[str | None, typer.Option(help="Only those of this method.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only those of this API key.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only those with this label; repeatable.")
    ] = None,
    after: Annotated[str | None, typer.Option(metavar="TIME", help="Only those created after, UTC.")] = None,
    before: Annotated[str | None, typer.Option(metavar="TIME", help="Only those created before, UTC.")] = None,
    oldest: Annotated[bool, typer.Option("--oldest", help="Oldest first.")] = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """List jobs."""
    labels = [f"{name}:{value}" for name, value in _labels(label or []).items()]
    named = {"dataset": dataset, "method": method, "owner": owner, "created_after": after, "created_before": before}
    filters: dict[str, str | Sequence[str]] = {name: value for name, value in named.items() if value is not None}
    filters |= {name: values for name, values in (("state", state), ("label", labels)) if values}
    filters |= {"order": "oldest"} if oldest else {}
    with connect(url) as client:
        jobs, following = client.jobs(limit=limit, cursor=cursor, filters=filters)
    if json:
        as_json({"items": [job.model_dump(mode="json") for job in jobs], "next": following})
        return
    table = Table(box=None)
    # Whole at any width: it is there to be copied.
    table.add_column("id", no_wrap=True, min_width=26)
    for title in ("job", "state", "stage", "done", "acc. %", "created"):
        table.add_column(title)
    for job in jobs:
        progress = job.progress if job.progress and not job.is_final else JobProgress()
        done = "" if progress.job_percent is None else f"{progress.job_percent:.0f} %"
        accuracy = f"{job.accuracy.mean:.1f}" if job.accuracy else ""
        created = f"{job.created_at:%Y-%m-%d %H:%M}"
        table.add_row(job.id, job.title, job.state, progress.stage or "", done, accuracy, created)
    results.print(table)
    if following:
        messages.print(f"more: the same with --cursor {following}")


def show(job_id: JobId, url: Url = None, json: AsJson = False) -> None:
    """Show one job: its state, its figures, or why it failed."""
    with connect(url) as client:
        _show(client.job(job_id), json)


def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing, over further attempts too, until the job has ended.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Only this attempt, to its end; from the last one on by default.")
    ] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Print what the job's driver has printed."""
    with connect(url) as client:
        if follow and not json:
            with detaching(job_id):
                for line in client.follow_log(job_id, attempt=attempt):
                    results.print(line, markup=False, end="")
            return
        lines = client.follow_log(job_id, attempt=attempt) if follow else [client.logs(job_id, attempt=attempt)]
        text = "".join(lines)
    if json:
        as_json({"id": job_id, "logs": text})
    else:
        results.print(text, markup=False, end="")


def watch(job_id: JobId, url: Url = None, json: AsJson = False) -> None:
    """Follow a job to its end; exit code 1 if it does not succeed. Ctrl-C leaves it alone."""
    with connect(url) as client:
        with detaching(job_id):
            job = follow(client, client.job(job_id))
        _show(job, json)
    if job.state != "succeeded":
        raise typer.Exit(1)


def cancel(
    job_id: JobId,
    force: Annotated[bool, typer.Option("--force", help="At once, not at its next step.")] = False,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Let it save itself before; `ncfm rerun` goes on from there.")
    ] = False,
    grace: Annotated[float | None, typer.Option(min=0, max=3600, help="Seconds that a graceful end may take.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Cancel a job."""
    with connect(url) as client:
        _show(
            client.cancel(job_id, mode="force" if force else "graceful", checkpoint=checkpoint, grace_seconds=grace),
            json,
        )


def rm(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Of jobs that have ended.")],
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Take jobs that have ended out of the lists; their files go with the next collection of garbage."""
    with connect(url) as client:
        for job_id in job_ids:
            client.delete(job_id)
    if json:
        as_json({"deleted": job_ids})


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
        bars, current = StageBars(progress), job
        for current in client.watch(job.id):
            bars.update(current)
    return current


@contextmanager
def detaching(job_id: str) -> Iterator[None]:
    """Ctrl-C inside ends the command, and leaves the job alone."""
    try:
        yield
    except KeyboardInterrupt:
        messages.print(
            f"detached: job {job_id} goes on. `ncfm watch {job_id}` follows it, `ncfm cancel {job_id}` ends it.",
            markup=False,
        )
        raise typer.Exit(EXIT_DETACHED) from None


def _document(spec: Path | None, dataset: str | None, ipc: int | None, changes: Sequence[str]) -> dict[str, JsonValue]:
    """The submission that a command line gives."""
    document = read_document(spec) if spec is not None else {}
    given = {"dataset": dataset, "ipc": ipc}
    document |= {name: value for name, value in given.items() if value is not None}
    return with_changes(document, changes)


def _labels(given: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise SpecError.of("--label", each, "not of the form key=value", "Try --label paper=dm.")
        labels[name] = value
    return labels


def _handed_in(client: Client, job: Job, *, wait: bool, json: bool) -> None:
    """Say what became of a submission, and follow it where that is wanted."""
    for warning in job.warnings:
        messages.print(f"warning: {warning}", markup=False)
    if wait:
        messages.print(f"job {job.id}: {job.title}")
        with detaching(job.id):
            job = follow(client, job)
    _show(job, json)
    if wait and job.state != "succeeded":
        raise typer.Exit(1)


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
    if job.queue is not None:
        table.add_row("queue", f"place {job.queue.position}{f': {job.queue.message}' if job.queue.message else ''}")
    if job.progress and not job.is_final:
        left = f", about {job.progress.eta_seconds:.0f} s left" if job.progress.eta_seconds is not None else ""
        table.add_row("stage", f"{job.progress.stage} {job.progress.count}{left}")
        if job.progress.job_count:
            table.add_row("whole job", job.progress.job_count)
    if job.state == "failed":
        table.add_row("error", in_commands(job.complaint))
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
            spread = "" if figure.std is None else f" +- {figure.std:.1f}"
            table.add_row(title, f"{figure.mean:.1f}{spread}", str(figure.n))
    if job.result is not None and job.result.label_robust_score is not None:
        table.caption = f"label-robust score (DD-Ranking): {job.result.label_robust_score:.3f}"
    return table


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for command in (submit, validate, rerun, ls, show, watch, logs, cancel, rm, pull):
        app.command()(command)
