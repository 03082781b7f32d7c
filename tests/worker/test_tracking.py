"""What goes into an MLflow run, as far as it needs no server (test_run.py has one)."""

from __future__ import annotations

import pytest

from ncfm_core.errors import TrackingError
from ncfm_core.spec import DatasetSpec
from ncfm_core.submission import resolve
from worker.driver.live import RunIdentity, flatten
from worker.tracking import MAX_VALUE_CHARS, MlflowRun, _Data, _metrics, _pictured_step, as_text


def test_spec_is_flattened_to_dotted_names() -> None:
    params = flatten(resolve({"dataset": "digits", "ipc": 1}).document())
    assert params["method.augment.ops"] == ["color", "crop", "cutout"]
    assert params["evaluate.0.training.lr"] == 0.005
    assert params["search"] is None
    assert not any(isinstance(value, dict) for value in params.values())


def test_empty_parts_are_kept() -> None:
    assert flatten({"a": {}, "b": []}) == {"a": {}, "b": []}


def test_value_is_text_within_the_limit() -> None:
    assert as_text("plain") == "plain"
    assert as_text([1, 2]) == "[1, 2]"
    assert as_text(None) == "null"
    assert len(as_text("x" * 10_000)) == MAX_VALUE_CHARS


@pytest.mark.parametrize("separator", ["%", "+", "~"])
def test_step_of_a_picture_is_read_from_its_name(separator: str) -> None:
    name = separator.join(("images/synthetic", "step", "125", "timestamp", "17", "uuid.png"))
    assert _pictured_step(name) == 125
    assert _pictured_step("images/other.png") is None


def test_server_that_is_away_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    identity = RunIdentity(job_id="J", experiment="digits", name="n", params={}, tags={})
    with pytest.raises(TrackingError, match="MLflow did not take it"):
        MlflowRun("http://127.0.0.1:1", "http://127.0.0.1:1", identity)


def test_logged_data_set_can_be_loaded_again_and_keeps_its_digest() -> None:
    data = _Data(DatasetSpec(name="digits"), "sha256:" + "a" * 64, {"num_train": 1297})
    assert data.digest == "a" * 32
    assert data.source.load().train_images.shape == (1297, 1, 8, 8)


def test_step_that_comes_twice_is_logged_once() -> None:
    """As where a stage began again after a loss."""
    rows = [
        ("d/", {"step": 1.0, "time": 0.0, "loss": 2.0}),
        ("d/", {"step": 1.0, "time": 9.0, "loss": 3.0, "gap": 4.0}),
    ]
    found = [(metric.key, metric.value, metric.step) for metric in _metrics(rows, {})]
    assert found == [("d/loss", 2.0, 1), ("d/gap", 4.0, 1)]
    assert [metric.key for metric in _metrics(rows, {"d/loss": {1}})] == ["d/gap"]
