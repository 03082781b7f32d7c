"""From a spec to what has to be computed: stages, each with the content key of its result. Pure and light.

A key is the hash of all that changes the numbers of a result (data, networks, recipes, method, seed and the version of the code)
and of nothing else: two jobs that need the same teacher find the same one, whatever machine they run on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import JsonValue

from ncfm_core.cost import Costs
from ncfm_core.parts import Part
from ncfm_core.spec import CORESETS, CoresetName, EvaluationSpec, JobSpec, digest
from worker.records import StageName

Kind = Literal[
    "teacher", "search", "distill", "evaluation", "random_real", "herding", "k_center", "full_data", "publish"
]

STAGE_VERSIONS: dict[Kind, int] = {
    "teacher": 2,
    "search": 2,
    "distill": 2,
    "evaluation": 2,
    "random_real": 2,
    "herding": 1,
    "k_center": 1,
    "full_data": 2,
    "publish": 2,
}
"""Version of the code behind each kind of result.

Add one when a change of the code gives other numbers (or other files) for the same spec, data and seed: results that are stored
under the old version are then no longer found. A change that leaves every number as it was needs none.
"""

STAGE_OF: dict[Kind, StageName] = {
    "teacher": "teachers",
    "search": "search",
    "distill": "distill",
    "evaluation": "evaluate",
    "random_real": "evaluate",
    "herding": "evaluate",
    "k_center": "evaluate",
    "full_data": "evaluate",
    "publish": "publish",
}


NUMBERED: frozenset[Kind] = frozenset({"teacher", "evaluation", "random_real", "herding", "k_center"})
"""Kinds of which a job may need several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One result that a job needs."""

    kind: Kind
    index: int = 0
    """Which teacher or evaluation."""
    key: str | None
    """Content key; None while it is not known."""
    held_out: bool = False
    """A teacher of the search, trained without the part of the training data that judges the trials."""

    @property
    def stage(self) -> StageName:
        return STAGE_OF[self.kind]

    @property
    def label(self) -> str:
        """For a person: `teacher 2`, `full data`."""
        name = self.kind.replace("_", " ") + (" for the search" if self.held_out else "")
        return f"{name} {self.index}" if self.kind in NUMBERED else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a job needs, in the order of the stages."""

    search_teachers: tuple[Build, ...]
    search: Build | None
    teachers: tuple[Build, ...]
    distill: Build
    evaluations: tuple[Build, ...]
    random_real: tuple[Build, ...]
    coresets: tuple[Build, ...]
    """Herding and k-center as far as they are asked for, each for every evaluation in turn."""
    full_data: Build
    publish: Build

    def builds(self) -> Iterator[Build]:
        yield from self.search_teachers
        if self.search is not None:
            yield self.search
        yield from self.teachers
        yield self.distill
        yield from self.evaluations
        yield from self.random_real
        yield from self.coresets
        yield self.full_data
        yield self.publish


def cut_key(key: str, step: int) -> str:
    """Key of a distillation that ended at a step before its last: never that of the whole one."""
    return digest({"cut": key, "step": step})


def plan(
    spec: JobSpec, data_digest: str | None, *, held_out_digest: str | None = None, cut_at: int | None = None
) -> Plan:
    """What the job needs, with keys as far as they are known.

    With a search, the method of the distillation is what the search finds: its key and those that hang on it stay unknown, and
    the driver plans again with the method that was found.

    Args:
        spec: resolved.
        data_digest: of the data set; None before it was inspected, and then no key is known.
        held_out_digest: of the data set as the search splits it; None where there is no search or before it was inspected.
        cut_at: step at which the distillation ended early; None for a whole one.
    """
    searched = None if spec.search else data_digest
    teachers = _teachers(spec, data_digest)
    distill = _distill(spec, searched, teachers)
    if cut_at is not None and distill.key is not None:
        distill = replace(distill, key=cut_key(distill.key, cut_at))
    evaluations = tuple(_evaluation(spec, index, entry, distill) for index, entry in enumerate(spec.evaluate))
    random_real = tuple(
        _random_real(spec, index, entry, data_digest, teachers) for index, entry in enumerate(spec.evaluate)
    )
    coresets = tuple(
        _coreset(spec, name, index, entry, teachers)
        for name in CORESETS
        if name in spec.baselines
        for index, entry in enumerate(spec.evaluate)
    )
    full_data = _full_data(spec, data_digest)
    return Plan(
        search_teachers=_teachers(spec, held_out_digest, held_out=True) if spec.search else (),
        search=_search(spec, data_digest),
        teachers=teachers,
        distill=distill,
        evaluations=evaluations,
        random_real=random_real,
        coresets=coresets,
        full_data=full_data,
        publish=_publish(spec, (distill, *evaluations, *random_real, *coresets, full_data)),
    )


def operations_of(build: Build, costs: Costs) -> float:
    """Floating-point operations that a result takes, roughly; what chooses or writes files counts for nothing."""
    match build.kind:
        case "teacher":
            return costs.teacher
        case "search":
            return costs.search
        case "distill":
            return costs.distill
        case "full_data":
            return costs.full_data
        case "publish":
            return 0.0
        case _:
            return costs.judged[build.index]


def held_out(spec: JobSpec) -> tuple[float, int] | None:
    """Fraction and seed of the split that judges trials; the seed is the pool's, so that jobs share their teachers."""
    return (spec.search.validation_fraction, spec.teachers.seed) if spec.search else None


def _key(kind: Kind, parts: dict[str, JsonValue]) -> str:
    return digest({"stage": kind, "version": STAGE_VERSIONS[kind]} | parts)


def _values(part: Part, *, without: frozenset[str] = frozenset()) -> JsonValue:
    values: JsonValue = part.model_dump(mode="json", exclude=set(without))
    return values


def _teachers(spec: JobSpec, data_digest: str | None, *, held_out: bool = False) -> tuple[Build, ...]:
    return tuple(
        Build(
            kind="teacher", index=index, held_out=held_out, key=data_digest and _teacher_key(spec, data_digest, index)
        )
        for index in range(spec.teachers.count)
    )


def _teacher_key(spec: JobSpec, data_digest: str, index: int) -> str:
    parts: dict[str, JsonValue] = {
        "data": data_digest,
        "model": _values(spec.model),
        "training": _values(spec.teachers.training),
        "seed": spec.teachers.seed,
        "index": index,
    }
    return _key("teacher", parts)


def _search(spec: JobSpec, data_digest: str | None) -> Build | None:
    if spec.search is None:
        return None
    if data_digest is None:
        return Build(kind="search", key=None)
    parts: dict[str, JsonValue] = {
        "data": data_digest,
        "ipc": spec.ipc,
        "method": _values(spec.method),
        "model": _values(spec.model),
        "teachers": _values(spec.teachers),
        "student": _evaluation_values(spec.evaluate[0]),
        "search": _values(spec.search),
        "seed": spec.seed,
    }
    return Build(kind="search", key=_key("search", parts))


def _distill(spec: JobSpec, data_digest: str | None, teachers: tuple[Build, ...]) -> Build:
    if data_digest is None:
        return Build(kind="distill", key=None)
    parts: dict[str, JsonValue] = {
        "data": data_digest,
        "ipc": spec.ipc,
        "method": _values(spec.method),
        "model": _values(spec.model),
        "teachers": [teacher.key for teacher in teachers],
        "seed": spec.seed,
    }
    return Build(kind="distill", key=_key("distill", parts))


def _evaluation_values(entry: EvaluationSpec) -> JsonValue:
    """Without the protocol, which is only the recipe's name."""
    return _values(entry, without=frozenset({"protocol"}))


def _evaluation(spec: JobSpec, index: int, entry: EvaluationSpec, distill: Build) -> Build:
    if distill.key is None:
        return Build(kind="evaluation", index=index, key=None)
    parts: dict[str, JsonValue] = {"distill": distill.key, "evaluation": _evaluation_values(entry), "seed": spec.seed}
    return Build(kind="evaluation", index=index, key=_key("evaluation", parts))


def _labellers(entry: EvaluationSpec, teachers: tuple[Build, ...]) -> dict[str, JsonValue]:
    """The teachers whose logits real images are judged with, where the protocol trains on logits."""
    return {"labellers": [teacher.key for teacher in teachers]} if entry.training.needs_soft_labels else {}


def _random_real(
    spec: JobSpec, index: int, entry: EvaluationSpec, data_digest: str | None, teachers: tuple[Build, ...]
) -> Build:
    if data_digest is None:
        return Build(kind="random_real", index=index, key=None)
    parts: dict[str, JsonValue] = {
        "data": data_digest,
        "ipc": spec.ipc,
        "evaluation": _evaluation_values(entry),
        "seed": spec.seed,
    }
    return Build(kind="random_real", index=index, key=_key("random_real", parts | _labellers(entry, teachers)))


def _coreset(spec: JobSpec, name: CoresetName, index: int, entry: EvaluationSpec, teachers: tuple[Build, ...]) -> Build:
    """Chosen by the features of the pool's first teacher, whose key names the data and the network."""
    teacher = teachers[0]
    if teacher.key is None:
        return Build(kind=name, index=index, key=None)
    parts: dict[str, JsonValue] = {
        "teacher": teacher.key,
        "ipc": spec.ipc,
        "evaluation": _evaluation_values(entry),
        "seed": spec.seed,
    }
    return Build(kind=name, index=index, key=_key(name, parts | _labellers(entry, teachers)))


def _full_data(spec: JobSpec, data_digest: str | None) -> Build:
    if data_digest is None:
        return Build(kind="full_data", key=None)
    parts: dict[str, JsonValue] = {
        "data": data_digest,
        "model": _values(spec.evaluate[0].model),
        "full_data": _values(spec.full_data),
        "seed": spec.teachers.seed,
    }
    return Build(kind="full_data", key=_key("full_data", parts))


def _publish(spec: JobSpec, parts_of: tuple[Build, ...]) -> Build:
    """The published files name the protocols and hold every accuracy, so all of them are in the key."""
    if any(part.key is None for part in parts_of):
        return Build(kind="publish", key=None)
    parts: dict[str, JsonValue] = {
        "results": [part.key for part in parts_of],
        "protocols": [entry.protocol for entry in spec.evaluate],
    }
    return Build(kind="publish", key=_key("publish", parts))
