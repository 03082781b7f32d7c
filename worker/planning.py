"""What `python -m worker plan` says: the plan, and what of it is stored already. Light."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TypedDict

from ncfm_core.catalog import DATASETS
from ncfm_core.spec import JobSpec
from ncfm_core.submission import check_counts
from worker.plan import Build, held_out, plan
from worker.records import result_path
from worker.settings import Surroundings
from worker.storage import Storage

NEEDED = ("torch", "sklearn")
"""What loads such data: a machine that has the service alone may lack it."""
NOT_INSPECTED = "unknown until inspected"
NOT_SEARCHED = "unknown until searched"


class BuildLine(TypedDict):
    stage: str
    name: str
    key: str
    state: str
    """`cached`, `to build` or `unknown`."""


class PlanDocument(TypedDict):
    dataset: str
    ipc: int
    spec_digest: str
    data_digest: str
    builds: list[BuildLine]


def is_cheap_to_inspect(spec: JobSpec) -> bool:
    """Whether the data come with what is installed here, and need no files."""
    is_built_in = spec.dataset.uri is None and not DATASETS[spec.dataset.name].files
    return is_built_in and all(find_spec(name) is not None for name in NEEDED)


def describe_plan(spec: JobSpec, surroundings: Surroundings, *, inspect: bool) -> PlanDocument:
    """The plan as plain values.

    Args:
        spec: resolved.
        surroundings: where data and results are.
        inspect: load the data here; without it no key is known.
    """
    digest, held_out_digest = _digests(spec, surroundings) if inspect else (None, None)
    storage = Storage(surroundings.storage_url)
    unknown = NOT_SEARCHED if digest else NOT_INSPECTED
    return {
        "dataset": spec.dataset.name,
        "ipc": spec.ipc,
        "spec_digest": spec.digest(),
        "data_digest": digest or NOT_INSPECTED,
        "builds": [
            _line(build, storage, unknown) for build in plan(spec, digest, held_out_digest=held_out_digest).builds()
        ],
    }


def _line(build: Build, storage: Storage, unknown: str) -> BuildLine:
    if build.key is None:
        return {"stage": build.stage, "name": build.label, "key": unknown, "state": "unknown"}
    state = "to build" if storage.size(result_path(build.key)) is None else "cached"
    return {"stage": build.stage, "name": build.label, "key": build.key, "state": state}


def _digests(spec: JobSpec, surroundings: Surroundings) -> tuple[str, str | None]:
    from worker.data import load

    dataset = load(spec.dataset, surroundings.data_access)
    check_counts(spec, dataset.class_counts)
    split = held_out(spec)
    return dataset.digest, dataset.hold_out(split[0], seed=split[1]).digest if split else None
