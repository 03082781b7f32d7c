"""Publishing later what MLflow lacks, against a real tracking store: nothing lost, nothing twice, whenever it is broken off."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from ncfm_core.errors import DamagedError, SpecError, TrackingError
from ncfm_core.spec import JobSpec
from worker.driver.attempt import Assignment
from worker.driver.board import Board
from worker.driver.border import drive
from worker.driver.live import Run, Tracker, identity_of
from worker.driver.publishing import publish
from worker.history import HISTORY_FILE, read_history
from worker.records import AttemptResult, StageResult, StopRequest, attempt_path, now
from worker.settings import Surroundings
from worker.storage import Storage
from worker.tracking import MlflowRun

# The store runs in this process here, with warnings of its own that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store; its artifacts go to a folder beside it."""
    folder = tmp_path_factory.mktemp("mlflow")
    url = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=url)
    client.create_experiment("digits", artifact_location=str(folder / "artifacts"))
    return url


@pytest.fixture
def client(server: str) -> Iterator[mlflow.MlflowClient]:
    """Of a server without runs."""
    client = mlflow.MlflowClient(tracking_uri=server)
    yield client
    for run in client.search_runs(["1"]):
        client.delete_run(run.info.run_id)


@pytest.fixture
def surroundings(storage: Storage, server: str) -> Surroundings:
    return Surroundings(storage=storage.url, mlflow_url=server, data_dir=Path("unused"))


def away() -> Run:
    raise TrackingError.of("mlflow_url", "", "away", "")


def attempt(spec: JobSpec, surroundings: Surroundings, storage: Storage, tracker: Tracker) -> AttemptResult:
    assignment = Assignment(spec=spec, job_id="J", attempt=1, started_at=now())
    return drive(assignment, surroundings, storage, tracker, Board("J", 1))


@pytest.fixture
def pending(spec: JobSpec, surroundings: Surroundings, storage: Storage, in_process: object) -> AttemptResult:
    """An attempt that succeeded while MLflow was away."""
    result = attempt(spec, surroundings, storage, Tracker(away, patience_s=0.3))
    assert (result.outcome, result.publication, result.mlflow_run_id) == ("succeeded", "pending", None)
    return result


def steps(client: mlflow.MlflowClient, run_id: str) -> dict[str, list[int]]:
    names = client.get_run(run_id).data.metrics
    return {name: [each.step for each in client.get_metric_history(run_id, name)] for name in names}


def files(client: mlflow.MlflowClient, run_id: str, folder: str | None = None) -> set[str]:
    listed = client.list_artifacts(run_id, folder)
    inside = [files(client, run_id, each.path) for each in listed if each.is_dir]
    return {each.path for each in listed if not each.is_dir}.union(*inside)


def assert_complete(client: mlflow.MlflowClient, storage: Storage, result: AttemptResult) -> None:
    (run,) = client.search_runs(["1"], "tags.`ncfm.job_id` = 'J'")
    assert run.info.status == "FINISHED"
    assert run.info.end_time == round(result.finished_at.timestamp() * 1000)
    assert run.data.params["method.steps"] == "60"
    assert run.inputs is not None and run.inputs.dataset_inputs[0].dataset.name == "digits"
    found = steps(client, run.info.run_id)
    assert all(len(each) == len(set(each)) for each in found.values()), found
    assert found["accuracy/distilled"] == [0]
    (distilled,) = [
        each
        for path in storage.list("results")
        if (each := storage.get_record(path, StageResult)) and each.stage == "distill"
    ]
    history = next(storage.read_file(file) for file in distilled.files if file.name == HISTORY_FILE)
    assert found["distill/discrepancy"] == [row["step"] for row in read_history(history).rows]
    stored = files(client, run.info.run_id)
    assert {artifact.name for artifact in result.artifacts} <= stored
    assert sum(name.startswith("images/") and name.endswith(".png") for name in stored) == 6


def test_what_was_pending_is_published_and_again_changes_nothing(
    client: mlflow.MlflowClient,
    pending: AttemptResult,
    spec: JobSpec,
    storage: Storage,
    surroundings: Surroundings,
) -> None:
    for _ in range(2):
        publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)
        assert_complete(client, storage, pending)


def test_publication_that_was_broken_off_is_carried_to_its_end(
    client: mlflow.MlflowClient,
    pending: AttemptResult,
    spec: JobSpec,
    storage: Storage,
    surroundings: Surroundings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_off(*_: Any, **__: Any) -> None:
        raise TrackingError.of("mlflow_url", "", "away", "")

    for broken in ("log_data", "log_rows", "log_pictures", "log_files", "set_tags", "close"):
        with monkeypatch.context() as patched:
            patched.setattr(MlflowRun, broken, break_off)
            with pytest.raises(TrackingError):
                publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)
    publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)
    assert_complete(client, storage, pending)


def test_result_that_is_gone_cannot_be_published(
    client: mlflow.MlflowClient,
    pending: AttemptResult,
    spec: JobSpec,
    storage: Storage,
    surroundings: Surroundings,
) -> None:
    storage.delete([path for path in storage.list("results")][:1])
    with pytest.raises(DamagedError, match="is gone"):
        publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)
    assert client.search_runs(["1"]) == []


def test_run_of_an_attempt_that_was_lost_is_closed_with_its_trials(
    client: mlflow.MlflowClient, spec: JobSpec, storage: Storage, surroundings: Surroundings
) -> None:
    run = MlflowRun(surroundings.mlflow_url, "", identity_of(spec, "J", 1))
    trial = client.create_run("1", tags={"ncfm.search_of": "J", "mlflow.parentRunId": run.run_id})
    other = client.create_run("1", tags={"ncfm.search_of": "another"})
    publish(spec, "J", 1, status="KILLED", storage=storage, surroundings=surroundings)
    assert client.get_run(run.run_id).info.status == client.get_run(trial.info.run_id).info.status == "KILLED"
    assert client.get_run(other.info.run_id).info.status == "RUNNING"


def test_no_run_is_made_for_an_attempt_with_nothing_to_show(
    client: mlflow.MlflowClient, spec: JobSpec, storage: Storage, surroundings: Surroundings
) -> None:
    publish(spec, "J", 1, status="FAILED", storage=storage, surroundings=surroundings)
    assert client.search_runs(["1"]) == []
    with pytest.raises(SpecError, match="--status"):
        publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)


def test_stopped_attempt_closes_its_run_and_later_gets_what_it_lacked(
    client: mlflow.MlflowClient,
    spec: JobSpec,
    storage: Storage,
    surroundings: Surroundings,
    in_process: Any,
) -> None:
    turns = list[str]()

    def before(label: str) -> None:
        turns.append(label)
        if turns.count("distill") == 6:
            request = StopRequest(checkpoint=False, requested_at=now())
            storage.put_record(attempt_path("J", 1, "stop.json"), request)

    in_process.before = before
    run = MlflowRun(surroundings.mlflow_url, "", identity_of(spec, "J", 1))
    result = attempt(spec, surroundings, storage, Tracker(away, patience_s=0.3))
    assert (result.outcome, result.publication) == ("stopped", "pending")
    publish(spec, "J", 1, status=None, storage=storage, surroundings=surroundings)
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert len(steps(client, run.run_id)["teachers/0/loss"]) == 5
    assert "accuracy/distilled" not in steps(client, run.run_id)


def test_stopped_attempt_names_its_run_when_that_was_made_at_its_end(
    client: mlflow.MlflowClient, spec: JobSpec, storage: Storage, surroundings: Surroundings, in_process: object
) -> None:
    asked = threading.Event()

    class Slow(Tracker):
        """Whose server makes the run only once its end is asked for."""

        def close(self, status: str, *, wait_s: float = 60.0) -> bool:
            asked.set()
            return super().close(status, wait_s=60.0)

    def connect() -> MlflowRun:
        asked.wait(60)
        return MlflowRun(surroundings.mlflow_url, "", identity_of(spec, "J", 1))

    storage.put_record(attempt_path("J", 1, "stop.json"), StopRequest(checkpoint=False, requested_at=now()))
    board, assignment = Board("J", 1), Assignment(spec=spec, job_id="J", attempt=1, started_at=now())
    result = drive(assignment, surroundings, storage, Slow(connect, on_open=board.tracked), board)
    (run,) = client.search_runs(["1"], "tags.`ncfm.job_id` = 'J'")
    assert (result.outcome, result.publication, run.info.status) == ("stopped", "done", "KILLED")
    assert result.mlflow_run_id == run.info.run_id


def test_attempt_with_a_server_is_published_by_itself(
    client: mlflow.MlflowClient, spec: JobSpec, storage: Storage, surroundings: Surroundings, in_process: object
) -> None:
    identity = identity_of(spec, "J", 1)
    result = attempt(spec, surroundings, storage, Tracker(lambda: MlflowRun(surroundings.mlflow_url, "", identity)))
    assert (result.outcome, result.publication) == ("succeeded", "done")
    (run,) = client.search_runs(["1"], "tags.`ncfm.job_id` = 'J'")
    assert run.info.status == "FINISHED"


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}
    (tmp_path / "job.yaml").write_text("dataset: digits\nipc: 1\n")
    code = "import sys; from worker.__main__ import main; code = main(sys.argv[1:]);"
    code += "print(sorted({'torch', 'ray'} & set(sys.modules))); sys.exit(code)"
    given = ["publish", str(tmp_path / "job.yaml"), "--job-id", "J", "--storage", str(tmp_path / "storage"), *arguments]
    return subprocess.run(
        [sys.executable, "-c", code, *given],
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


def test_command_tells_what_cannot_be_done_from_what_can_be_tried_again(tmp_path: Path) -> None:
    done = command(tmp_path, "--status", "KILLED", "--mlflow", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout.strip()) == (1, "[]")
    assert "MLflow did not take it" in done.stderr
    assert command(tmp_path, "--mlflow", "http://127.0.0.1:1").returncode == 2
