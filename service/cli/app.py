"""The `ncfm` command. Light: starts in a fraction of a second, and never loads torch, ray or mlflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ncfm_core.errors import NcfmError, SpecError
from service.cli import datasets, jobs, keys, upkeep
from service.cli.bench import bench
from service.cli.db import db
from service.cli.demo import demo
from service.cli.terminal import as_json, messages, results
from service.cli.words import for_terminal
from service.client import ClientError, ServiceAway
from service.local.stack import Wishes, run_stack
from service.local.state import Home, StackState, StackStatus
from service.scopes import KeyProblem
from service.settings import SettingsError, load_settings

BAD_INPUT = (ClientError, KeyProblem, SettingsError, SpecError)
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_AWAY, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="ncfm",
    help="Dataset distillation as a service.",
    epilog=(
        "Exit codes: 0 done; 1 it failed (the job, or a process of the stack), or no stack runs (`status`); "
        "2 what was asked is not legal; "
        "3 no service answers; 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
jobs.register(app)
upkeep.register(app)
app.add_typer(db, name="db")
app.add_typer(keys.app, name="keys")
app.add_typer(datasets.app, name="datasets")
app.command()(demo)
# What comes after `bench`, --help too, is for the process that it starts.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


@app.command()
def up(
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Of the API: NCFM_PORT, or 8000 if free; 0 for any.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Of MLflow: 5000 if that is free; 0 for any free one.")
    ] = None,
    ray_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Of Ray's dashboard: 8265 if that is free; 0 for any.")
    ] = None,
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that jobs may use; all by default.")] = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True)] = False,
) -> None:
    """Run the whole stack on this machine until Ctrl-C.

    That is MLflow, Ray, the API and the controller. Jobs, sets, logs and runs are kept in NCFM_HOME, ~/.ncfm by default.
    """
    settings = load_settings()
    if port is None and "port" in settings.model_fields_set:
        port = settings.port
    wishes = Wishes(port=port, mlflow_port=mlflow_port, ray_port=ray_port, num_cpus=num_cpus)
    messages.print(f"starting in {settings.home} ...")
    run_stack(
        settings, wishes, say=messages.print, on_ready=_show_stack, lifeline=sys.stdin.fileno() if lifeline else None
    )
    messages.print("stopped; nothing is left running")


def _show_stack(state: StackState) -> None:
    results.print(f"API      {state.api}  (try {state.api}/docs)")
    results.print(f"MLflow   {state.mlflow}")
    results.print(f"Ray      {state.ray}  (its token: {state.ray_token_path})")
    results.print("Up. Hand in a job with `ncfm submit --dataset digits --ipc 1`; Ctrl-C stops everything.")


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Whether a stack of NCFM_HOME runs, and where; exit code 1 where none does."""
    settings = load_settings()
    found = Home(settings.home).status()
    if json:
        as_json(found.model_dump())
    elif found.state == "down":
        results.print(f"down: no stack runs in {settings.home}; start one with `ncfm up`")
    else:
        _show_status(settings.home, found)
    raise typer.Exit(EXIT_FAILED if found.state == "down" else 0)


def _show_status(home: Path, found: StackStatus) -> None:
    table = Table(title=f"{found.state}: {home}", show_header=False, box=None, title_justify="left")
    for name, pid in found.processes.items():
        address = {"api": found.api, "mlflow": found.mlflow, "ray": found.ray}.get(name) or ""
        table.add_row(name, address, f"pid {pid}" if pid else "not running")
    results.print(table)


@app.command()
def api() -> None:
    """Run the API alone. Settings come from NCFM_*."""
    from service import api as service_api

    service_api.main(load_settings())


@app.command()
def controller() -> None:
    """Run the controller alone. Settings come from NCFM_*."""
    from service import controller as service_controller

    service_controller.main(load_settings())


def _exit_code(error: NcfmError) -> int:
    if isinstance(error, ServiceAway):
        return EXIT_AWAY
    return EXIT_BAD_INPUT if isinstance(error, BAD_INPUT) else EXIT_FAILED


def main() -> None:
    """Run a command; what is wrong is said in one line for each problem."""
    try:
        app()
    except NcfmError as error:
        for problem in error.problems:
            said = for_terminal(problem)
            messages.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
