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


class SearchCutError(NcfmError):
    """A search ended before all of its trials had: what it found so far is not what was asked for."""

    code = "search_cut"


@dataclass(slots=True)
class Trial:
    """One sample of the space and what it reported at its rungs."""

    index: int
    params: dict[str, JsonValue]
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    is_lost: bool = False
    """Whether it failed with its process or node, and not by itself."""
    is_over: bool = False
    """Whether it was heard to the end: of its steps, by the scheduler's rule, or with an error."""

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


def check_complete(trials: Sequence[Trial], wanted: int) -> None:
    """A result stands for good: that of a part of the trials would be taken for the whole search by every later job.

    Raises:
        SearchCutError: some trials never began, were broken off, or were lost with where they ran.
    """
    lost = [trial for trial in trials if trial.is_lost]
    over = sum(trial.is_over and not trial.is_lost for trial in trials)
    if over >= wanted and not lost:
        return
    reasons = f": {lost[0].error}" if lost else ""
    message = f"it ended with {over} of its {wanted} trials, {len(lost)} were lost{reasons}"
    raise SearchCutError.of("search", None, message, "It is tried again from its start.")


def read_trials(data: bytes) -> list[Trial]:
    """The trials in `trials.jsonl`."""
    return [Trial(**json.loads(line)) for line in data.splitlines()]


def write_trial(trial: Trial) -> bytes:
    values = {"index": trial.index, "params": trial.params, "rows": trial.rows, "error": trial.error}
    return json.dumps(values).encode() + b"\n"
