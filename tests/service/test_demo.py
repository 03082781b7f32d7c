"""The demo's outcome, and the bars it shows."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from service.cli.demo import summary
from service.cli.progress_bars import StageBars
from service.cli.showing import accuracy_table
from service.replies import Job

FIGURE = {"mean": 87.0, "std": 0.5, "n": 10, "best_mean": 88.0, "values": [87.0]}


def job(state: str, stages: dict[str, str], stage: str | None = None, completed: int = 0) -> Job:
    seconds = {"total": 60.0, "inspect": 1.0, "teachers": 20.0, "distill": 30.0, "evaluate": 9.0}
    return Job.model_validate(
        {
            "id": "01j",
            "state": state,
            "spec": {"dataset": {"name": "digits"}, "ipc": 1},
            "progress": {"stage": stage, "completed": completed, "total": 500, "unit": "step"},
            "stages": stages,
            "result": {"distilled": FIGURE, "random_real": FIGURE, "full": FIGURE, "seconds": seconds},
            "mlflow_run_id": "r",
            "mlflow_url": "http://mlflow/r",
            "created_at": "2026-01-01T00:00:00Z",
        }
    )


def test_summary_has_the_agreed_fields() -> None:
    told = summary(job("succeeded", {}), preview=Path("/set/preview.png"), set_path=Path("/set"))

    accuracy = {"mean": 87.0, "std": 0.5, "n": 10}
    assert json.loads(json.dumps(told)) == {
        "job_id": "01j",
        "dataset": "digits",
        "ipc": 1,
        "distilled": accuracy,
        "random_real": accuracy,
        "full": accuracy,
        "seconds": {"total": 60.0, "teachers": 20.0, "distill": 30.0, "evaluate": 9.0},
        "mlflow_run_id": "r",
        "mlflow_url": "http://mlflow/r",
        "preview": "/set/preview.png",
        "set_path": "/set",
    }


def test_bars_follow_the_stages_of_a_job() -> None:
    console = Console(file=io.StringIO())
    with Progress(*StageBars.columns(), console=console, auto_refresh=False) as progress:
        bars = StageBars(progress)
        stages = {"teachers": "running", "distill": "pending", "evaluate": "pending"}
        bars.update(job("running", stages, "teachers", 3))
        bars.update(job("running", stages | {"teachers": "done", "distill": "running"}, "distill", 250))

        shown = {task.description: (task.visible, task.completed, task.total) for task in progress.tasks}

    assert shown == {"teachers": (True, 1, 1), "distill": (True, 250, 500), "evaluate": (False, 0, None)}


def test_bar_of_the_whole_job_stands_beside_those_of_its_stages() -> None:
    console = Console(file=io.StringIO())
    running = job("running", {"distill": "running"}, "distill", 250)
    assert running.progress is not None
    told = {"job_percent": 42.0, "job_eta_seconds": 30.0}
    with Progress(*StageBars.columns(), console=console, auto_refresh=False) as progress:
        bars = StageBars(progress)
        bars.update(running.model_copy(update={"progress": running.progress.model_copy(update=told)}))
        shown = {task.description: (task.completed, task.total, task.fields["note"]) for task in progress.tasks}
    assert shown == {"distill": (250, 500, "250/500 steps"), "job": (42.0, 100, "42 %, about 30 s left")}
    percent = running.progress.model_copy(update={"completed": 25, "total": 100, "unit": "%"})
    assert (percent.count, percent.job_count) == ("25 %", "")


def test_table_shows_no_spread_of_one_student() -> None:
    done = job("succeeded", {})
    assert done.result is not None and done.result.full is not None
    alone = done.result.full.model_copy(update={"std": None, "n": 1})
    done = done.model_copy(update={"result": done.result.model_copy(update={"full": alone})})
    console = Console(file=(shown := io.StringIO()), width=120)
    console.print(accuracy_table(done))
    lines = shown.getvalue().splitlines()
    assert [("+-" in line) for line in lines if "87.0" in line] == [True, True, False]
