"""Paths and documents of the storage root, which the controller relies on."""

from __future__ import annotations

import re

import pytest

from worker.records import (
    AttemptResult,
    AttemptStatus,
    attempt_path,
    checkpoint_folder,
    damaged_path,
    now,
    object_folder,
    result_path,
    set_folder,
    spec_path,
)

KEY = "sha256:" + "0123456789ab" * 6


def test_paths_are_the_documented_ones() -> None:
    assert spec_path("J") == "jobs/J/spec.json"
    assert attempt_path("J", 2, "status.json") == "jobs/J/attempts/2/status.json"
    assert attempt_path("J", 2, "stop.json") == "jobs/J/attempts/2/stop.json"
    assert damaged_path(KEY, 1) == f"damaged/{KEY[7:]}-1.json"
    assert result_path(KEY) == f"results/{KEY[7:]}.json"
    assert re.fullmatch(r"objects/J-2/distill-0123456789ab-[0-9a-f]{8}", object_folder("J-2", "distill", KEY))
    assert checkpoint_folder("J", KEY) == f"checkpoints/J/{KEY[7:]}"
    assert checkpoint_folder("J", KEY, 2) == f"checkpoints/J/{KEY[7:]}/2"
    assert set_folder("J") == "jobs/J/set"


def test_result_of_an_older_worker_is_read() -> None:
    """Without what was added since."""
    words = {"job_id": "J", "attempt": 1, "outcome": "failed", "error": None, "retryable": True, "figures": None}
    words |= {"evaluations": [], "seconds": {}, "artifacts": [], "mlflow_run_id": None, "mlflow_url": None}
    result = AttemptResult.model_validate(words | {"warnings": [], "finished_at": now()})
    assert (result.publication, result.shortened, result.keys, result.data) == ("none", None, (), None)


def test_status_of_an_older_driver_says_nothing_of_what_it_kept() -> None:
    words = {"job_id": "J", "attempt": 1, "stage": "distill", "completed": 1, "total": 2, "unit": "step", "message": ""}
    words |= {"stages": {}, "heartbeat_at": now(), "mlflow_run_id": None, "mlflow_url": None}
    assert AttemptStatus.model_validate(words).kept == 0


def test_records_cannot_be_changed() -> None:
    status = AttemptStatus(
        job_id="J",
        attempt=1,
        stage="distill",
        completed=1,
        total=2,
        unit="step",
        message="",
        stages={"distill": "running"},
        heartbeat_at=now(),
        mlflow_run_id=None,
        mlflow_url=None,
    )
    with pytest.raises(ValueError, match="frozen"):
        status.completed = 2
    assert AttemptStatus.model_validate_json(status.model_dump_json()) == status
