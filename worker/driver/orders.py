"""From a plan to orders: which results each one needs and the arguments of its stage. Pure and light."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ncfm_core.spec import JobSpec
from worker.driver.pool import Order
from worker.evidence import Results, evidence
from worker.plan import Build, Plan, held_out


def teacher_orders(plan: Plan, spec: JobSpec) -> list[Order]:
    """All teachers: of the search, then of the distillation."""
    return [_teacher(build, spec) for build in (*plan.search_teachers, *plan.teachers)]


def distill_orders(plan: Plan, spec: JobSpec) -> list[Order]:
    """What needs no synthetic set, and the set itself before the rest, of a plan without a search."""
    teachers = _keys(plan.teachers)
    return [
        Order(build=plan.distill, needs=teachers, arguments=_distill_arguments(spec, teachers)),
        *(_random_real(build, spec, teachers) for build in plan.random_real),
        *(_coreset(build, spec, teachers) for build in plan.coresets),
        Order(build=plan.full_data, arguments=lambda _: _full_data_arguments(spec)),
    ]


def judging_orders(plan: Plan, spec: JobSpec) -> list[Order]:
    """What the set is judged by and published with, once its key is known."""
    parts = (plan.distill, *plan.evaluations, *plan.random_real, *plan.coresets, plan.full_data)
    return [
        *(_evaluation(build, spec, str(plan.distill.key)) for build in plan.evaluations),
        Order(
            build=plan.publish,
            needs=_keys(parts),
            arguments=lambda results: {"evidence": evidence(plan, results), "spec": spec},
        ),
    ]


def _keys(builds: tuple[Build, ...]) -> tuple[str, ...]:
    return tuple(str(build.key) for build in builds)


def _teacher(build: Build, spec: JobSpec) -> Order:
    arguments = {
        "model": spec.model,
        "training": spec.teachers.training,
        "seed": spec.teachers.seed,
        "index": build.index,
        "held_out": held_out(spec) if build.held_out else None,
    }
    return Order(build=build, arguments=lambda _: arguments)


def _distill_arguments(spec: JobSpec, teachers: tuple[str, ...]) -> Callable[[Results], dict[str, Any]]:
    return lambda results: {
        "teachers": [results[key] for key in teachers],
        "model": spec.model,
        "method": spec.method,
        "ipc": spec.ipc,
        "seed": spec.seed,
    }


def _evaluation(build: Build, spec: JobSpec, distill: str) -> Order:
    entry = spec.evaluate[build.index]
    return Order(
        build=build,
        needs=(distill,),
        arguments=lambda results: {"distilled": results[distill], "entry": entry, "seed": spec.seed},
    )


def _random_real(build: Build, spec: JobSpec, teachers: tuple[str, ...]) -> Order:
    labellers = teachers if spec.evaluate[build.index].training.needs_soft_labels else ()
    return Order(
        build=build, needs=labellers, arguments=lambda results: _baseline_arguments(build, spec, results, labellers)
    )


def _coreset(build: Build, spec: JobSpec, teachers: tuple[str, ...]) -> Order:
    labellers = teachers if spec.evaluate[build.index].training.needs_soft_labels else ()
    return Order(
        build=build,
        needs=labellers or teachers[:1],
        arguments=lambda results: {
            "teacher": results[teachers[0]],
            **_baseline_arguments(build, spec, results, labellers),
        },
    )


def _baseline_arguments(build: Build, spec: JobSpec, results: Results, labellers: tuple[str, ...]) -> dict[str, Any]:
    return {
        "model": spec.model,
        "ipc": spec.ipc,
        "entry": spec.evaluate[build.index],
        "seed": spec.seed,
        "labellers": [results[key] for key in labellers],
    }


def _full_data_arguments(spec: JobSpec) -> dict[str, Any]:
    return {"model": spec.evaluate[0].model, "recipe": spec.full_data, "seed": spec.teachers.seed}
