"""The MLflow run of a job. The only file that imports mlflow; only the driver's tracker calls it.

A run is found again by its job id, and what it has is read back before anything is added, so that an attempt, or a retry after a
call whose answer was lost, completes the run without writing a row twice.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow.data.dataset import Dataset as MlflowDataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image
from pydantic import JsonValue

from ncfm_core.errors import TrackingError
from ncfm_core.spec import DatasetSpec
from worker.driver.live import RunIdentity, TrialRecord
from worker.history import Picture, Row
from worker.settings import Surroundings

PICTURE_KEY = "synthetic"
MAX_VALUE_CHARS = 6000
MAX_METRICS = 1000
MAX_PARAMS = 100
DIGEST_CHARS = 32
"""MLflow keeps at most 36 characters of a data set's digest; the whole of it stands in the tag `ncfm.data_digest`."""


class _Source(DatasetSource):
    """Where a data set comes from: its spec, since the files are where the process keeps them."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec

    @staticmethod
    def _get_source_type() -> str:
        return "ncfm"

    def load(self, **_: Any) -> Any:
        """The data set, read from where this process keeps its data (NCFM_DATA_DIR)."""
        from worker.data import load  # brings torch, which the driver does without

        return load(self._spec, Surroundings().data_access)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> _Source:
        return cls(DatasetSpec.model_validate(raw_source))

    def to_dict(self) -> dict[str, Any]:
        return self._spec.model_dump(mode="json")

    @classmethod
    def from_dict(cls, source_dict: dict[str, Any]) -> _Source:
        return cls(DatasetSpec.model_validate(source_dict))


class _Data(MlflowDataset):
    """The inspected data set, as MLflow keeps it beside the run."""

    def __init__(self, spec: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None:
        self._facts, self._given_digest = facts, digest.removeprefix("sha256:")[:DIGEST_CHARS]
        super().__init__(_Source(spec), name=spec.name)

    def _compute_digest(self) -> str:
        return self._given_digest

    def to_dict(self) -> dict[str, str]:
        return super().to_dict() | {"profile": json.dumps(self._facts)}

    @property
    def profile(self) -> Any:
        return self._facts

    @property
    def schema(self) -> None:
        return None


@contextmanager
def _told(url: str) -> Generator[None, None, None]:
    """Turn whatever the client raises into one error."""
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise TrackingError.of("mlflow_url", url, f"MLflow did not take it: {reason}", "Is the server up?") from error


class MlflowRun:
    """The run of one job."""

    def __init__(self, url: str, public_url: str, identity: RunIdentity, *, is_live: bool = True) -> None:
        """Find the run of the job, or make it.

        Args:
            url: of the server.
            public_url: the same as people reach it.
            identity: which run.
            is_live: whether the job runs: then so does its run from now on.

        Raises:
            TrackingError: the server cannot be used.
        """
        self._server, self._client = url, mlflow.MlflowClient(tracking_uri=url)
        self._identity = identity
        self._logged: dict[str, set[int]] | None = None
        """Steps that the server has, by metric; None where it has to be asked."""
        self._pictured: set[int] | None = None
        with _told(url):
            experiment_id = self._experiment(identity.experiment)
            run = self._find(experiment_id, {"ncfm.job_id": identity.job_id})
            if run is None:
                run = self._client.create_run(
                    experiment_id, run_name=identity.name, tags={"ncfm.job_id": identity.job_id, **identity.tags}
                )
            elif is_live:
                self._client.update_run(run.info.run_id, status="RUNNING")
            self.run_id = str(run.info.run_id)
            self._experiment_id = experiment_id
            self._describe(self.run_id, identity.params, identity.tags)
        self.url = f"{public_url.rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def _experiment(self, name: str) -> str:
        for _ in range(2):
            if found := self._client.get_experiment_by_name(name):
                if found.lifecycle_stage != "active":
                    raise TrackingError.of(
                        "experiment", name, "the experiment was deleted in MLflow", "Restore it there."
                    )
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                # Another driver was first between the two calls.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise TrackingError.of("experiment", name, "can be neither found nor made", "Look at the MLflow server's log.")

    def _find(self, experiment_id: str, tags: Mapping[str, str]) -> Any:
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = self._client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
        return runs[0] if runs else None

    def _describe(self, run_id: str, params: Mapping[str, JsonValue], tags: Mapping[str, str]) -> None:
        known = self._client.get_run(run_id).data.params
        new = [Param(name, text) for name, value in params.items() if name not in known and (text := as_text(value))]
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_data(self, dataset: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None:
        """Say which data it was; once more changes nothing."""
        with _told(self._server):
            inputs = self._client.get_run(self.run_id).inputs
            if inputs is not None and inputs.dataset_inputs:
                return
            entity = _Data(dataset, digest, facts)._to_mlflow_entity()
            context = [InputTag("mlflow.data.context", "distillation")]
            self._client.log_batch(self.run_id, tags=[RunTag("ncfm.data_digest", digest)])
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(entity, context)])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with _told(self._server):
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_rows(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Add rows of metrics, each with the prefix of its names, leaving out what the server has."""
        with _told(self._server):
            if self._logged is None:
                self._logged = self._read_back(self.run_id)
            metrics = _metrics(rows, self._logged)
            # Until every batch is acknowledged nobody knows what arrived.
            logged, self._logged = self._logged, None
            self._send(self.run_id, metrics)
        for metric in metrics:
            logged.setdefault(metric.key, set()).add(metric.step)
        self._logged = logged

    def _send(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])

    def _read_back(self, run_id: str) -> dict[str, set[int]]:
        names = self._client.get_run(run_id).data.metrics
        return {name: {each.step for each in self._client.get_metric_history(run_id, name)} for name in names}

    def log_pictures(self, pictures: Iterable[Picture]) -> None:
        """Add grids to the image slider, leaving out those of steps that are there."""
        with _told(self._server):
            if self._pictured is None:
                paths = [each.path for each in self._client.list_artifacts(self.run_id, "images")]
                self._pictured = {step for path in paths if (step := _pictured_step(path)) is not None}
            # Until every one is acknowledged nobody knows what arrived.
            pictured, self._pictured = self._pictured, None
            for picture in pictures:
                if picture.step not in pictured:
                    image = Image.open(io.BytesIO(picture.png))
                    self._client.log_image(self.run_id, image, key=PICTURE_KEY, step=picture.step, synchronous=True)
                    pictured.add(picture.step)
            self._pictured = pictured

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Upload artifacts by path, replacing what is there."""
        with _told(self._server), tempfile.TemporaryDirectory(prefix="ncfm-artifacts-") as folder:
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self._client.log_artifacts(self.run_id, folder)

    def log_trials(self, trials: Iterable[TrialRecord]) -> None:
        """One nested run for each trial."""
        with _told(self._server):
            for trial in trials:
                self._log_trial(trial)

    def _log_trial(self, trial: TrialRecord) -> None:
        tags = {"ncfm.search_of": self._identity.job_id, "ncfm.trial": str(trial.index)}
        run = self._find(self._experiment_id, tags)
        if run is None:
            tags |= {"mlflow.parentRunId": self.run_id}
            run = self._client.create_run(self._experiment_id, run_name=f"trial {trial.index}", tags=tags)
        run_id = str(run.info.run_id)
        self._describe(run_id, trial.params, {"ncfm.stopped_early": str(not trial.finished).lower()})
        self._send(run_id, _metrics([("", row) for row in trial.rows], self._read_back(run_id)))
        self._client.set_terminated(run_id, "FINISHED")

    def close(self, status: str, *, ended_at: datetime | None = None) -> None:
        """End the run, and its trials that are still open: FINISHED, FAILED or KILLED.

        Args:
            status: of all of them.
            ended_at: when the job ended; None for now.
        """
        with _told(self._server):
            end_time = None if ended_at is None else round(ended_at.timestamp() * 1000)
            self._client.set_terminated(self.run_id, status, end_time)
            # A server that was stuck may have made a run after its caller had given up and asked again.
            for run in self._client.search_runs([self._experiment_id], _tagged("job_id", self._identity.job_id)):
                if run.info.run_id != self.run_id:
                    self._client.delete_run(run.info.run_id)
            open_trials = _tagged("search_of", self._identity.job_id) + " and attributes.status = 'RUNNING'"
            for run in self._client.search_runs([self._experiment_id], open_trials):
                self._client.set_terminated(run.info.run_id, status, end_time)


def has_run(url: str, identity: RunIdentity) -> bool:
    """Whether the server has a run of the job.

    Raises:
        TrackingError: the server cannot be used.
    """
    with _told(url):
        client = mlflow.MlflowClient(tracking_uri=url)
        experiment = client.get_experiment_by_name(identity.experiment)
        return experiment is not None and bool(
            client.search_runs([experiment.experiment_id], _tagged("job_id", identity.job_id), max_results=1)
        )


def _tagged(name: str, value: str) -> str:
    return f"tags.`ncfm.{name}` = '{value}'"


def _metrics(rows: Iterable[tuple[str, Row]], logged: Mapping[str, set[int]]) -> list[Metric]:
    """What the server lacks; of a step that comes twice, as after a stage began again, the first."""
    found: dict[tuple[str, int], Metric] = {}
    for prefix, row in rows:
        step = int(row["step"])
        for name, value in row.items():
            key = prefix + name
            if name not in ("step", "time") and step not in logged.get(key, ()):
                found.setdefault((key, step), Metric(key, value, int(row["time"]), step))
    return list(found.values())


def _pictured_step(path: str) -> int | None:
    # The client separates with `%`, which some artifact stores turn into `+` or `~`.
    found = re.search(rf"{PICTURE_KEY}[%~+]step[%~+](\d+)[%~+]", path)
    return int(found[1]) if found else None


def as_text(value: JsonValue) -> str:
    """A parameter's value as MLflow shows it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
