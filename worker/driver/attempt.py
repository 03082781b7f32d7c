"""The stages of one attempt in their order: inspect, teachers, search, distill, evaluate, publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from pydantic import JsonValue

from ncfm_core.progress import Progress
from ncfm_core.spec import JobSpec
from ncfm_core.submission import check_counts
from worker import tasks
from worker.driver.live import Tracker, TrialRecord
from worker.driver.orders import distill_orders, evidence, teacher_orders
from worker.driver.pool import Pool, Results
from worker.driver.reporter import Reporter
from worker.driver.story import result_file, tell
from worker.environment import code_version
from worker.evidence import Evidence
from worker.plan import Plan, held_out, plan
from worker.records import FileRecord, StageResult, set_folder
from worker.settings import Surroundings
from worker.site import DataFacts, Site
from worker.storage import Storage
from worker.trials import BEST_FILE, TRIALS_FILE, best_spec, read_trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One attempt at one job."""

    spec: JobSpec
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a successful attempt found."""

    spec: JobSpec
    """As it was run: with the method that the search found."""
    evidence: Evidence
    files: tuple[FileRecord, ...]
    """Of the published set and of the search."""


class Attempt:
    """Carries one attempt out on the cluster that this process is connected to."""

    def __init__(
        self,
        assignment: Assignment,
        surroundings: Surroundings,
        storage: Storage,
        reporter: Reporter,
        tracker: Tracker | None,
    ) -> None:
        self._job, self._surroundings, self._storage = assignment, surroundings, storage
        self._reporter, self._tracker = reporter, tracker

    def run(self) -> Outcome:
        """All stages; what is stored already is taken from there.

        Raises:
            NcfmError: one of them failed.
        """
        spec = self._job.spec
        cluster = tasks.nodes()
        demand = tasks.demand(spec.resources, cluster)
        self._reporter.say(f"each task takes CPU {demand.cpus}, GPU {demand.gpus:g} and computes on {demand.device}")
        facts, dataset = self._inspect(demand)
        slots = max(1, sum(node.slots(demand) for node in cluster))
        pool = Pool(self._site(demand), self._storage, dataset, demand=demand, slots=slots, observer=self._reporter)
        needed = plan(spec, facts.digest, held_out_digest=facts.held_out_digest)
        self._reporter.board.expect(["inspect", *(build.stage for build in needed.builds()), "publish"])
        searched = self._search(pool, needed, dataset, demand)
        if searched is not None:
            best = cast(Mapping[str, JsonValue], searched.figures["best"])
            self._reporter.say(f"the search chose {dict(best)}")
            spec = best_spec(spec, best)
            needed = replace(plan(spec, facts.digest), search=needed.search, search_teachers=needed.search_teachers)
        # All at once: what the set does not wait for fills the slots that teachers and distillation leave free.
        results = pool.run([*teacher_orders(needed, self._job.spec), *distill_orders(needed, spec)])
        return self._publish(needed, results, spec, searched)

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
        )

    def _inspect(self, demand: tasks.Demand) -> tuple[DataFacts, object]:
        """Load the data once, on the cluster; every task takes it from the object store."""
        spec, reporter = self._job.spec, self._reporter
        reporter.begin("inspect", "data")
        facts_reference, dataset = tasks.inspect(
            spec.dataset, self._surroundings.data_access, held_out=held_out(spec), demand=demand
        )
        facts: DataFacts = tasks.fetch(facts_reference)
        reporter.board.finished("inspect", "data", cached=False)
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

        def report(progress: Progress) -> None:
            self._reporter.happened(build, progress)

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
            ),
        )
        if self._tracker is not None:
            self._tracker.offer_trials(self._trials(result))
        return result

    def _trials(self, searched: StageResult) -> list[TrialRecord]:
        trials = read_trials(result_file(self._storage, searched, TRIALS_FILE))
        furthest = max(trial.rungs() for trial in trials)
        return [
            TrialRecord(index=each.index, params=each.params, rows=each.rows, finished=each.rungs() == furthest)
            for each in trials
        ]

    def _publish(self, needed: Plan, results: Results, spec: JobSpec, searched: StageResult | None) -> Outcome:
        """Complete the MLflow run from what is stored, and put a plain copy of the set where people look for it."""
        published = results[str(needed.publish.key)]
        found = tuple(file for file in searched.files if file.name == BEST_FILE) if searched else ()
        outcome = Outcome(spec=spec, evidence=evidence(needed, results), files=published.files + found)
        self._reporter.begin("publish", "records")
        for file in outcome.files:
            if not file.name.endswith(".zip"):
                name = file.name.removeprefix("distilled/")
                self._storage.put(f"{set_folder(self._job.job_id)}/{name}", self._storage.read_file(file))
        if self._tracker is not None:
            self._reporter.say("publishes to MLflow")
            story = tell(
                self._storage, needed.builds(), results, evidence=outcome.evidence, published=published, spec=spec
            )
            files = {file.name: self._storage.read_file(file) for file in outcome.files}
            trials = self._trials(searched) if searched else ()
            self._tracker.complete(replace(story, files=files, trials=trials))
        self._reporter.board.finished("publish", "records", cached=False)
        return outcome
