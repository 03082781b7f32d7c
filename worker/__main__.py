"""`python -m worker run|plan|publish SPEC`: the only entry, for people, `ray job submit` and the controller."""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from types import FrameType
from typing import NoReturn

from pydantic import JsonValue, ValidationError

from ncfm_core.errors import DamagedError, NcfmError, Problem, ResourcesError, SpecError, StorageError
from ncfm_core.spec import ResourcesSpec
from ncfm_core.submission import problem_of
from worker.records import EXIT_USER_ERROR, now
from worker.settings import Surroundings, prepare_own_ray, ray_address
from worker.spec_file import load_spec
from worker.storage import Storage

RUN_STATUSES = ("FINISHED", "FAILED", "KILLED")
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""It becomes part of paths in the storage root."""


class Stop:
    """Handler of SIGTERM, which is how Ray stops a job: the process ends at once, and its attempt has no result."""

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        """The signal that came."""

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.number = number
        # The one exception that a waiting call of Ray lets through.
        raise KeyboardInterrupt

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, `EXIT_USER_ERROR`, or 1 for anything that is not the user's fault."""
    options, stop = _parser().parse_args(arguments), Stop()
    try:
        surroundings = _surroundings(options)
        if options.command == "plan":
            return _plan(options, surroundings)
        if options.command == "publish":
            return _publish(options, surroundings)
        return _run(options, surroundings, stop)
    except NcfmError as error:
        for problem in error.problems:
            _tell(f"error: {problem}")
        return EXIT_USER_ERROR if isinstance(error, SpecError | ResourcesError) else 1
    except KeyboardInterrupt:
        _tell(f"stopped by {signal.Signals(stop.number).name}")
        return 128 + stop.number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m worker", description="Distil a data set, or say what it would take."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "carry a job out on the Ray cluster at RAY_ADDRESS, or on one started for it"),
        ("plan", "show the stages of a job with the keys of their results; nothing is computed"),
        ("publish", "bring the MLflow run of an attempt that has ended to its end, from what is stored"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("spec", help="YAML or JSON file of a submission, or storage:jobs/<id>/spec.json")
        command.add_argument("--storage", help="storage root: a folder or a URL (default: NCFM_STORAGE)")
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        command.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE")
    run, publish = commands.choices["run"], commands.choices["publish"]
    run.add_argument("--job-id", help="id of the job (default: a new one)")
    run.add_argument(
        "--gpus",
        type=float,
        help="what `resources.gpus: auto` stands for (default: 1 where the cluster has any, else 0)",
    )
    run.add_argument("--started-at", help="when the job was first started, RFC 3339 (default: now)")
    publish.add_argument("--job-id", required=True, help="id of the job")
    publish.add_argument("--status", choices=RUN_STATUSES, help="of the run (default: what the attempt came to)")
    for command in (run, publish):
        command.add_argument("--attempt", type=int, default=1, help="number of the attempt at it")
        command.add_argument("--mlflow", help="MLflow server (default: NCFM_MLFLOW_URL)")
    inspect = commands.choices["plan"]
    inspect.add_argument(
        "--inspect",
        action=argparse.BooleanOptionalAction,
        help="load the data here, so that every key is known (default: those that need no files, digits)",
    )
    return parser


def _surroundings(options: argparse.Namespace) -> Surroundings:
    given = {"storage": options.storage, "mlflow_url": getattr(options, "mlflow", None)}
    try:
        return Surroundings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problems = [Problem(f"NCFM_{each['loc'][0]}".upper(), "", each["msg"], "") for each in error.errors()]
        raise SpecError(*problems) from None


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def _plan(options: argparse.Namespace, surroundings: Surroundings) -> int:
    from worker.planning import describe_plan, is_cheap_to_inspect

    spec = load_spec(options.spec, options.changes, lambda: Storage(surroundings.storage_url))
    inspect = is_cheap_to_inspect(spec) if options.inspect is None else options.inspect
    described = describe_plan(spec, surroundings, inspect=inspect)
    for each in described["builds"]:
        _tell(f"{each['stage']:9} {each['name']:24} {each['state']:9} {each['key']}")
    if not inspect:
        _tell("What is stored is known once the data are inspected: --inspect loads them here.")
    if options.json:
        sys.stdout.write(json.dumps(described) + "\n")
    return 0


def _run(options: argparse.Namespace, surroundings: Surroundings, stop: Stop) -> int:
    stop.install()
    _check(options)
    started_at = _started_at(options.started_at)
    spec = load_spec(options.spec, options.changes, lambda: Storage(surroundings.storage_url))
    if ray_address() is None:
        prepare_own_ray()
    from worker.driver.running import Request, run  # after the above: Ray reads its settings when it is imported

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("worker").addHandler(handler)
    request = Request(
        spec=spec, job_id=options.job_id, attempt=options.attempt, started_at=started_at, gpus=options.gpus
    )
    result, headline = run(request, surroundings, on_connected=stop.install)
    if result.error is not None:
        for problem in result.error.problems:
            _tell(f"error: {Problem(**problem)}")
        return 1 if result.retryable else EXIT_USER_ERROR
    if result.outcome == "stopped":
        _tell("stopped as asked")
        return 0
    _show(headline)
    if options.json:
        sys.stdout.write(json.dumps(headline) + "\n")
    return 0


def _publish(options: argparse.Namespace, surroundings: Surroundings) -> int:
    _check(options)
    storage = Storage(surroundings.storage_url)
    spec = load_spec(options.spec, options.changes, lambda: storage)
    from worker.driver.publishing import publish  # brings MLflow

    try:
        publish(
            spec, options.job_id, options.attempt, status=options.status, storage=storage, surroundings=surroundings
        )
    except StorageError as error:
        _tell(f"error: {error}")
        return EXIT_USER_ERROR if isinstance(error, DamagedError) else 1
    return 0


def _check(options: argparse.Namespace) -> None:
    gpus = getattr(options, "gpus", None)
    if gpus is not None:
        try:
            ResourcesSpec(gpus=gpus, cpus=1, memory_limit=None)
        except ValidationError as error:
            problem = problem_of(error.errors()[-1])
            raise SpecError.of("--gpus", gpus, problem.message, problem.hint) from None
    if options.attempt < 1:
        raise SpecError.of("--attempt", options.attempt, "must be at least 1", "")
    if options.job_id is not None and not JOB_ID.fullmatch(options.job_id):
        raise SpecError.of("--job-id", options.job_id, "must be letters, digits, _ and -, at most 64", "")


def _started_at(text: str | None) -> datetime:
    """When the job was first started: not after now, should the clocks of two machines differ."""
    if text is None:
        return now()
    try:
        started_at = datetime.fromisoformat(text)
    except ValueError:
        started_at = None
    if started_at is None or started_at.tzinfo is None:
        raise SpecError.of("--started-at", text, "not a time with its zone", "Try 2026-11-20T10:00:00Z.")
    return min(started_at, now())


def _show(headline: dict[str, JsonValue]) -> None:
    for name in ("distilled", "random_real", "herding", "k_center", "full"):
        figures = headline.get(name)
        if isinstance(figures, dict):
            spread = "" if figures["std"] is None else f" +- {figures['std']:.1f}"
            _tell(f"{name.replace('_', ' '):12} {figures['mean']:.1f}{spread} %  (n={figures['n']})")
    if isinstance(score := headline["label_robust_score"], float):
        _tell(f"{'label-robust score':12} {score:.3f}")
    for name in ("set_path", "preview", "mlflow_url"):
        if headline[name]:
            _tell(f"{name.removesuffix('_path').replace('_url', ''):12} {headline[name]}")


if __name__ == "__main__":
    sys.exit(main())
