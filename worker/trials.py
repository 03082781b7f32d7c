"""The trials of a search and which of them wins. Pure and light."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from ncfm_core.errors import NcfmError, Problem
from ncfm_core.spec import JobSpec, NcfmSpec
from worker.history import Row

BEST_FILE = "best.yaml"
TRIALS_FILE = "trials.jsonl"


class SearchError(NcfmError):
    """No trial of a search came to its end."""

    code = "search_failed"


@dataclass(slots=True)
class Trial:
    """One sample of the space and what it reported at its rungs."""

    index: int
    params: dict[str, JsonValue]
    rows: list[Row] = field(default_factory=list)
    error: str = ""

    def rungs(self) -> int:
        return len(self.rows)

    def accuracy(self) -> float:
        """On the held-out data, at the last rung that it reached."""
        return self.rows[-1]["accuracy"] if self.rows else 0.0


def with_params(method: NcfmSpec, params: Mapping[str, JsonValue]) -> NcfmSpec:
    """The method with some fields replaced, validated."""
    return NcfmSpec.model_validate_json(json.dumps(method.model_dump(mode="json") | dict(params)))


def best_spec(spec: JobSpec, params: Mapping[str, JsonValue]) -> JobSpec:
    """The job with the method that was found and no search."""
    return spec.model_copy(update={"method": with_params(spec.method, params), "search": None})


def best_of(trials: Sequence[Trial]) -> Trial:
    """The most accurate of those that came furthest; the first of equals.

    Raises:
        SearchError: none reported anything.
    """
    furthest = max((trial.rungs() for trial in trials), default=0)
    if not furthest:
        reasons = sorted({trial.error for trial in trials if trial.error})
        raise SearchError(Problem("search", "", f"every trial failed: {'; '.join(reasons)[:400]}", "Narrow the space."))
    return max((trial for trial in trials if trial.rungs() == furthest), key=Trial.accuracy)


def read_trials(data: bytes) -> list[Trial]:
    """The trials in `trials.jsonl`."""
    return [Trial(**json.loads(line)) for line in data.splitlines()]


def write_trial(trial: Trial) -> bytes:
    values = {"index": trial.index, "params": trial.params, "rows": trial.rows, "error": trial.error}
    return json.dumps(values).encode() + b"\n"
