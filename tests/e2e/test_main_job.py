"""The main job on the real stack: from POST /jobs to a set in MLflow."""

from __future__ import annotations

import hashlib
import io
import itertools
import zipfile
from collections.abc import Callable
from typing import Any, cast

import httpx
import pytest
import safetensors.torch

from ncfm_core.submission import resolve
from service.client import Client
from service.jobs import MOVES, State
from service.local.state import StackState
from service.replies import Event, Job

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

STAGES = ["inspect", "teachers", "distill", "evaluate", "publish"]
FIELDS = {
    *("id", "state", "reason", "spec", "requested", "warnings", "progress", "result", "error"),
    *("created_at", "started_at", "finished_at", "links"),
}


@pytest.fixture
def job(main_job: list[Job]) -> Job:
    """The main job at its end."""
    return main_job[-1]


def moves(events: list[Event]) -> list[tuple[str, str]]:
    return [(str(each.data["from"]), str(each.data["to"])) for each in events if each.type == "state"]


def test_job_is_told_apart_at_every_moment_when_it_runs(main_job: list[Job], small_job: Document) -> None:
    first, last = main_job[0], main_job[-1]

    assert (first.state, first.requested, first.result) == ("queued", small_job, None)
    assert first.spec == last.spec == resolve(small_job).document()
    assert [state for state, _ in itertools.groupby(look.state for look in main_job)][-2:] == ["running", "succeeded"]
    assert last.started_at is not None and last.finished_at is not None
    assert last.created_at <= last.started_at < last.finished_at
    assert set(last.stages) == set(STAGES)


def test_progress_only_grows_when_the_job_runs(main_job: list[Job]) -> None:
    seen = [look.progress for look in main_job if look.progress is not None and look.progress.stage is not None]

    order = [STAGES.index(str(progress.stage)) for progress in seen]
    assert order == sorted(order)
    assert all(0 <= progress.completed <= progress.total for progress in seen)
    distilled = [progress for progress in seen if progress.stage == "distill" and progress.unit == "step"]
    assert distilled and {progress.total for progress in distilled} == {600}
    assert [each.completed for each in distilled] == sorted(each.completed for each in distilled)


def test_events_are_gapless_and_legal_when_the_job_has_ended(stack_client: Client, job: Job) -> None:
    events = list(stack_client.events(job.id))

    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert moves(events) == [("queued", "starting"), ("starting", "running"), ("running", "succeeded")]
    assert all(State(to) in MOVES[State(start)] for start, to in moves(events))
    assert events[0].type == "created" and {event.type for event in events} <= {
        "created",
        "state",
        "stage",
        "waiting",
        "published",
    }
    told: Document = {}
    for event in events:
        told |= cast(Document, event.data.get("stages", {}))
    assert told == job.stages and set(told.values()) <= {"done", "cached"}, "the end tells how the last stages stand"


def test_result_has_the_figures_of_all_three_when_the_job_has_succeeded(job: Job) -> None:
    assert job.result is not None and job.error is None
    for figures, students in ((job.result.distilled, 2), (job.result.random_real, 2), (job.result.full, 1)):
        assert figures is not None
        assert figures.n == students
        assert 10 < figures.mean <= 100
        assert (figures.std is not None) == (students > 1)
    assert {"total", *STAGES} <= set(job.result.seconds)


def test_artifacts_are_those_of_the_manifest_when_they_are_downloaded(stack: StackState, job: Job) -> None:
    listed = httpx.get(f"{stack.api}/jobs/{job.id}/artifacts").json()["items"]
    manifest = {each["name"]: each for each in listed}
    archive = httpx.get(f"{stack.api}{job.links['archive']}")

    with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
        assert opened.testzip() is None
        members = {name: hashlib.sha256(opened.read(name)).hexdigest() for name in opened.namelist()}
    assert members == {name: each["sha256"] for name, each in manifest.items()}
    wanted = {
        f"distilled/{name}" for name in ("images.safetensors", "labels.safetensors", "manifest.json", "README.md")
    }
    wanted |= {"distilled/preview.png", "distilled/imagefolder.zip", "distilled/train.parquet", "evaluation.json"}
    assert wanted <= set(manifest)

    part = httpx.get(f"{stack.api}{manifest['distilled/preview.png']['href']}", headers={"Range": "bytes=1-3"})
    size = manifest["distilled/preview.png"]["size"]
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"PNG", f"bytes 1-3/{size}")


def test_set_has_one_image_for_each_class_when_it_is_opened(images_of: Callable[[str], bytes], job: Job) -> None:
    tensors = safetensors.torch.load(images_of(job.id))

    assert tensors["images"].shape == (10, 1, 8, 8)
    assert tensors["images"].isfinite().all()


def test_mlflow_has_the_whole_record_when_the_job_has_succeeded(
    stack: StackState, stack_client: Client, job: Job, read_run: Callable[[str, str], Document], until: Until
) -> None:
    # On a busy machine a publisher ends it a little later.
    until(lambda: read_run(stack.mlflow, str(job.mlflow_run_id))["status"] == "FINISHED")
    run = read_run(stack.mlflow, str(job.mlflow_run_id))

    assert (run["status"], run["tags"]["ncfm.job_id"]) == ("FINISHED", job.id)
    assert run["params"]["method.steps"] == "600" and run["params"]["dataset.name"] == "digits"
    assert [each["name"] for each in run["datasets"]] == ["digits"]
    digest = run["tags"]["ncfm.data_digest"]
    assert digest.startswith("sha256:") and run["datasets"][0]["digest"] in digest
    assert run["steps"]["accuracy/distilled"] == [0]
    assert max(run["steps"]["distill/discrepancy"]) == 600
    for name, steps in run["steps"].items():
        assert len(steps) == len(set(steps)), f"{name} has a step twice: {steps}"
    pictures = [name for name in run["files"] if name.startswith("images/") and name.endswith(".png")]
    assert len(pictures) == 6
    assert {each.name for each in stack_client.artifacts(job.id)} <= run["files"]
    assert [name for name in run["files"] if "/" not in name and name.endswith(".zip")] == ["distilled-digits-ipc1.zip"]


def test_no_run_is_left_running_when_all_jobs_have_ended(stack: StackState, job: Job, until: Until) -> None:
    api = f"{stack.mlflow}/api/2.0/mlflow"
    experiments = httpx.get(f"{api}/experiments/search", params={"max_results": 100}).json()["experiments"]
    query = {"experiment_ids": [each["experiment_id"] for each in experiments]}

    def runs() -> dict[str, str]:
        found = httpx.post(f"{api}/runs/search", json=query).json()["runs"]
        return {run["info"]["run_id"]: run["info"]["status"] for run in found}

    assert job.mlflow_run_id in runs()
    until(lambda: "RUNNING" not in runs().values())


def test_job_is_answered_with_its_place_and_finds_everything_when_it_is_posted_again(
    stack: StackState, stack_client: Client, main_job: list[Job], small_job: Document
) -> None:
    answer = httpx.post(f"{stack.api}/jobs", json=small_job)

    assert answer.status_code == 201
    posted = answer.json()
    assert answer.headers["location"] == f"/jobs/{posted['id']}"
    assert set(posted) >= FIELDS
    assert posted["id"] != main_job[-1].id and posted["spec"] == main_job[-1].spec

    again = stack_client.wait(posted["id"], on_change=lambda _: None)
    assert again.state == "succeeded", again.complaint
    assert {name: again.stages[name] for name in STAGES[1:4]} == dict.fromkeys(STAGES[1:4], "cached")
    assert again.result is not None and main_job[-1].result is not None
    assert again.result.distilled == main_job[-1].result.distilled
    assert again.result.seconds["teachers"] == again.result.seconds["distill"] == again.result.seconds["evaluate"] == 0
    assert stack_client.artifacts(again.id) == stack_client.artifacts(main_job[-1].id)


def test_teachers_are_shared_when_only_the_seed_differs(
    stack_client: Client, job: Job, small_job: Document, images_of: Callable[[str], bytes]
) -> None:
    other = stack_client.submit(small_job | {"seed": 1, "method": small_job["method"] | {"steps": 100}})
    other = stack_client.wait(other.id, on_change=lambda _: None)

    assert other.state == "succeeded", other.complaint
    assert (other.stages["teachers"], other.stages["distill"]) == ("cached", "done")
    assert images_of(other.id) != images_of(job.id)
