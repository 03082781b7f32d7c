"""The stages of one attempt in their order: inspect, teachers, search, distill, evaluate, publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath

from pydantic import JsonValue

from ncfm_core import cost
from ncfm_core.errors import DamagedError, LimitError
from ncfm_core.progress import Progress
from ncfm_core.spec import JobSpec
from ncfm_core.submission import check_counts
from worker import tasks
from worker.driver.live import Tracker
from worker.driver.orders import distill_orders, judging_orders, teacher_orders
from worker.driver.pool import Order, Pool
from worker.driver.reporter import Reporter
from worker.driver.share import Part
from worker.driver.story import search_method, tell, trial_records
from worker.environment import code_version
from worker.evidence import Evidence, Results, evidence, shortened_in, shortened_in_words
from worker.history import Trouble
from worker.plan import Build, Plan, held_out, operations_of, plan
from worker.records import (
    FileRecord,
    StageResult,
    StopRequest,
    checkpoint_folder,
    checkpoint_root,
    result_path,
    set_folder,
)
from worker.resuming import left_by_others
from worker.settings import Surroundings
from worker.site import DataFacts, Site
from worker.stopping import StopWatch
from worker.storage import Storage
from worker.trials import BEST_FILE, best_spec

PART_SECONDS = 1.0
"""What a part takes beside its operations, at least: for the share of the whole job alone."""
SAVINGS = {
    "inspect": ": loading the data took most",
    "teachers": ", or ask for fewer teachers or epochs of them",
    "search": ", or ask for fewer trials or steps of them",
    "distill": ": making the distillation ready took most",
}
"""What else may be done where a stage took most of a wall time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One attempt at one job."""

    spec: JobSpec
    job_id: str
    attempt: int
    started_at: datetime
    """When the job was first started: its wall time counts from there."""
    gpus: float | None = None
    """What `resources.gpus: auto` stands for; None for what the cluster has."""

    @property
    def deadline(self) -> float | None:
        """When the wall time is over, in seconds since 1970."""
        limit = self.spec.limits.wall_seconds
        return None if limit is None else self.started_at.timestamp() + limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a successful attempt found."""

    spec: JobSpec
    """As it was run: with the method that the search found."""
    evidence: Evidence
    files: tuple[FileRecord, ...]
    """Of the published set and of the search."""
    is_published: bool
    """Whether MLflow has all of it, where there is one."""


class Attempt:
    """Carries one attempt out on the cluster that this process is connected to."""

    def __init__(
        self,
        assignment: Assignment,
        surroundings: Surroundings,
        storage: Storage,
        reporter: Reporter,
        *,
        tracker: Tracker | None,
        watch: StopWatch,
    ) -> None:
        self._job, self._surroundings, self._storage = assignment, surroundings, storage
        self._reporter, self._tracker, self._watch = reporter, tracker, watch
        self._plan: Plan | None = None
        self._conditions: dict[str, JsonValue] = {}
        self._is_led_on = False

    def run(self) -> Outcome:
        """All stages; what is stored already is taken from there.

        Raises:
            NcfmError: one of them failed, or the attempt was asked to stop.
        """
        self._watch.check()
        spec = self._job.spec
        cluster = tasks.nodes()
        demand = tasks.demand(spec.resources, cluster, auto=self._job.gpus)
        self._reporter.board.gpus = demand.gpus
        self._reporter.say(f"each task takes CPU {demand.cpus}, GPU {demand.gpus:g} and computes on {demand.device}")
        facts, dataset = self._inspect(demand)
        site, slots = self._site(demand), max(1, sum(node.slots(demand) for node in cluster))
        self._conditions = site.conditions
        pool = Pool(site, self._storage, dataset, demand=demand, slots=slots, observer=self._reporter, guard=self)
        needed = self._plan = plan(spec, facts.digest, held_out_digest=facts.held_out_digest)
        self._reporter.board.expect(["inspect", *(build.stage for build in needed.builds()), "publish"])
        self._weigh(spec, facts, needed)
        try:
            searched = self._search(pool, needed, dataset, demand)
            if searched is not None:
                spec = best_spec(spec, search_method(searched))
                self._weigh(spec, facts, needed)
                self._reporter.say(f"the search chose {dict(search_method(searched))}")
                self._warn_of_lost(searched)
            return self._distill_and_publish(pool, spec, facts, searched)
        except LimitError:
            raise self._too_late() from None

    def _weigh(self, spec: JobSpec, facts: DataFacts, needed: Plan) -> None:
        """Let the board know what each part of the job roughly takes."""
        cluster = tasks.nodes()
        rate = cost.rate(spec, cpus=max(node.cpus for node in cluster), gpus=max(node.gpus for node in cluster))
        each = cost.costs(spec, facts.refine(spec.dataset.facts))
        weights: dict[Part, float] = {
            (build.stage, build.label): operations_of(build, each) / rate + PART_SECONDS for build in needed.builds()
        }
        self._reporter.board.weigh(weights | {("publish", "records"): PART_SECONDS})

    def check(self) -> None:
        """
        Raises:
            StoppedError: the attempt was asked to stop.
            LimitError: the wall time is over, and the distillation has not begun.
        """
        self._watch.check()
        if self._is_late() and not self._has_something():
            raise self._too_late()

    def asked(self) -> StopRequest | None:
        """The request to stop, if there is one."""
        return self._watch.now()

    def _is_late(self) -> bool:
        deadline = self._job.deadline
        return deadline is not None and time.time() >= deadline

    def _has_something(self) -> bool:
        """Whether the distillation has begun, in this attempt, an earlier one, or another job whose checkpoint it goes on from:
        only it and teachers leave checkpoints."""
        if self._reporter.board.has_begun("distill"):
            return True
        assert self._plan is not None
        if self._is_begun_elsewhere(self._plan.distill.key):
            return True
        teachers = (*self._plan.search_teachers, *self._plan.teachers)
        folders = [checkpoint_folder(self._job.job_id, str(build.key)) for build in teachers]
        paths = self._storage.list(checkpoint_root(self._job.job_id))
        return any(str(PurePosixPath(path).parents[1]) not in folders for path in paths if path.endswith(".json"))

    def _is_begun_elsewhere(self, key: str | None) -> bool:
        if key is None:
            return False
        if not self._is_led_on:  # kept, as it is asked several times a second once the wall time is over
            others = left_by_others(self._storage, key, job_id=self._job.job_id, environment=self._conditions)
            self._is_led_on = next(others, None) is not None
        return self._is_led_on

    def _too_late(self) -> LimitError:
        limit, seconds = self._job.spec.limits.wall_seconds, self._reporter.board.seconds()
        elapsed = time.time() - self._job.started_at.timestamp()
        rest = "waiting and starting" if self._job.attempt == 1 else "earlier attempts, waiting and starting"
        parts = seconds | {rest: max(0.0, elapsed - sum(seconds.values()))}
        took = ", ".join(f"{stage} {value:.0f} s" for stage, value in parts.items() if value >= 1)
        most = max(parts, key=lambda part: parts[part])
        message = f"over before the first step of the distillation; it took: {took}"
        return LimitError.of(
            "limits.wall_seconds", limit, message, f"Allow more{SAVINGS.get(most, f': {rest} took most')}."
        )

    def _site(self, demand: tasks.Demand) -> Site:
        return Site(
            job_id=self._job.job_id,
            attempt=self._job.attempt,
            storage_url=self._storage.url,
            device=demand.device,
            threads=demand.cpus,
            memory_limit=self._job.spec.resources.memory_limit,
            checkpoint=self._job.spec.checkpoint,
            code_version=code_version(),
            wall_seconds=self._job.spec.limits.wall_seconds,
            deadline=self._job.deadline,
        )

    def _inspect(self, demand: tasks.Demand) -> tuple[DataFacts, object]:
        """Load the data once, on the cluster; every task takes it from the object store."""
        spec, reporter = self._job.spec, self._reporter
        reporter.begin("inspect", "data")
        facts_reference, dataset = tasks.inspect(
            spec.dataset, self._surroundings.data_access, held_out=held_out(spec), demand=demand
        )
        while not tasks.ready([facts_reference], timeout_s=0.5):
            self._watch.check()
        facts: DataFacts = tasks.fetch(facts_reference)
        reporter.board.finished("inspect", "data", cached=False)
        reporter.board.data = facts.model_dump(mode="json")
        reporter.say(
            f"{spec.dataset.name}: {len(facts.class_counts)} classes, {facts.num_train} training and {facts.num_test} test "
            f"images, split {facts.split}, {facts.ignored_files} other files ignored, {facts.digest}"
        )
        if self._tracker is not None:
            self._tracker.describe_data(spec.dataset, facts.digest, facts.model_dump(mode="json"))
        check_counts(spec, facts.class_counts)
        return facts, dataset

    def _search(self, pool: Pool, needed: Plan, dataset: object, demand: tasks.Demand) -> StageResult | None:
        build = needed.search
        if build is None:
            return None
        from worker.search import search  # Ray Tune takes two seconds to import, for the few jobs that search

        # Those of the distillation as well, so that the stages come in their order.
        teachers = pool.run(teacher_orders(needed, self._job.spec))
        if self._storage.size(result_path(str(build.key))) is None:
            teachers = self._verified(pool, needed.search_teachers, teachers)

        def report(event: Progress | Trouble) -> None:
            self._reporter.happened(build, event)

        result = pool.build_here(
            build,
            lambda: search(
                self._site(demand),
                self._storage,
                dataset,
                key=str(build.key),
                spec=self._job.spec,
                teachers=[teachers[str(each.key)] for each in needed.search_teachers],
                demand=demand,
                report=report,
                check=self.check,
            ),
        )
        if self._tracker is not None:
            try:
                self._tracker.offer_trials(trial_records(self._storage, result))
            except DamagedError as error:
                pool.build_again(error)
        return result

    def _warn_of_lost(self, searched: StageResult) -> None:
        """What a search chose from is less than what was asked for."""
        lost = searched.figures.get("lost")
        if isinstance(lost, list) and lost:
            self._reporter.warn(f"{len(lost)} of {searched.figures['trials']} trials were lost: {lost[0]}")

    def _verified(self, pool: Pool, builds: Sequence[Build], results: Results) -> Results:
        """Results whose files were read: a trial that meets a damaged one would only count as a bad trial."""
        while True:
            try:
                for build in builds:
                    self._storage.find_result(str(build.key), read=True)
                return results
            except DamagedError as error:
                results = pool.build_again(error)

    def _distill_and_publish(
        self, pool: Pool, spec: JobSpec, facts: DataFacts, searched: StageResult | None
    ) -> Outcome:
        """Everything that is left, all at once: what the set does not wait for fills the slots that it leaves free."""
        first = needed = plan(spec, facts.digest)
        assert self._plan is not None

        def then(build: Build, result: StageResult) -> Sequence[Order]:
            """The set is judged and published under the key that it came out with."""
            nonlocal needed
            if build != first.distill:
                return ()
            if shortened := shortened_in(result):
                needed = plan(spec, facts.digest, cut_at=shortened.step)
                self._reporter.warn(shortened_in_words(shortened))
            return judging_orders(needed, spec)

        results = pool.run([*teacher_orders(self._plan, self._job.spec), *distill_orders(needed, spec)], then=then)
        while True:
            try:
                whole = replace(needed, search=self._plan.search, search_teachers=self._plan.search_teachers)
                return self._publish(whole, results, spec, searched)
            except DamagedError as error:
                results = pool.build_again(error)

    def _publish(self, needed: Plan, results: Results, spec: JobSpec, searched: StageResult | None) -> Outcome:
        """Put a plain copy of the set where people look for it, and complete the MLflow run from what is stored."""
        published = results[str(needed.publish.key)]
        found = tuple(file for file in searched.files if file.name == BEST_FILE) if searched else ()
        files = published.files + found
        self._reporter.begin("publish", "records")
        for file in files:
            if not file.name.endswith(".zip"):
                self._copy(file)
        is_published = False
        if self._tracker is not None:
            self._reporter.say("publishes to MLflow")
            is_published = self._tracker.complete(tell(self._storage, needed, results, searched=searched, spec=spec))
        self._reporter.board.finished("publish", "records", cached=False)
        return Outcome(spec=spec, evidence=evidence(needed, results), files=files, is_published=is_published)

    def _copy(self, file: FileRecord) -> None:
        data, path = (
            self._storage.read_file(file),
            f"{set_folder(self._job.job_id)}/{file.name.removeprefix('distilled/')}",
        )
        self._reporter.patiently(lambda: self._storage.put(path, data), "the copy of the set")
