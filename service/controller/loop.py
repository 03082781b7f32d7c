"""The controller's process: looks at everything, lets `policy.decide` decide, and acts. `ncfm controller`.

It keeps nothing of its own that a restart would miss: the database says what was decided, Ray and the storage root say what
became of it. Every action may be done twice, so it can be killed between any two.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import FrameType
from typing import Protocol

from ncfm_core.errors import NcfmError, StorageError
from service import logs
from service.cluster import Capacity, Cluster, ClusterUnreachable, RayJob, SubmissionRefused
from service.controller.decision import Action, Attempt, Move, Policy, Report, Snapshot, Stop, Submit, Wait
from service.controller.launch import Launch, Submitter, submission_id
from service.controller.policy import decide
from service.controller.sightings import Lookout
from service.jobs import Job, Reason, State
from service.settings import Settings
from service.store import Store
from worker.records import AttemptResult, AttemptStatus, ErrorRecord, attempt_path, now
from worker.storage import Storage

logger = logging.getLogger("ncfm.controller")

QUEUE_WINDOW = 50
"""Queued jobs looked at in one round."""
STOP_PAUSE_S = 5.0
"""Before Ray is asked again to stop the same driver: it needs a while itself."""
AFTER_MOVE_S = 0.02
"""Pause after a round that moved something: what follows from it need not wait for the next poll."""


class Muscle(Submitter, Protocol):
    """What the controller needs of a cluster (service.cluster.Cluster)."""

    def find(self, submission_id: str) -> RayJob | None: ...
    def stop(self, submission_id: str) -> None: ...
    def capacity(self) -> Capacity: ...
    def logs(self, submission_id: str) -> str: ...


class Controller:
    """One reconcile loop over all jobs."""

    def __init__(
        self,
        store: Store,
        storage: Storage,
        cluster: Muscle,
        *,
        policy: Policy,
        launch: Launch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._storage, self._cluster = store, storage, cluster
        self._policy, self._launch, self._clock = policy, launch, clock
        self._heartbeats: dict[str, tuple[datetime, float]] = {}
        self._stopped_at: dict[str, float] = {}
        self._storage_error = self._said_trouble = ""
        self.ray_error = ""
        """Why Ray could not be asked in the last round; empty where it could."""
        self.capacity: Capacity | None = None
        """Totals of the cluster in the last round."""

    def run(self, stop: threading.Event, *, poll_seconds: float, lookout: Lookout | None = None) -> None:
        """Rounds until `stop` is set."""
        while not stop.is_set():
            moved = False
            try:
                moved = self.round()
                if lookout is not None:
                    lookout.note(self.capacity, self.ray_error)
                self._say_trouble(self.ray_error or self._storage_error)
            except NcfmError as error:
                # The database is away: nothing can be decided until it is back.
                self._say_trouble(str(error))
            stop.wait(AFTER_MOVE_S if moved else poll_seconds)

    def round(self) -> bool:
        """Look, decide, act once; whether a job was moved."""
        snapshot = self._look()
        moved = is_ray_away = False
        for action in decide(snapshot, self._policy):
            if is_ray_away and isinstance(action, Submit | Stop):
                # Each would wait as long for the same answer.
                continue
            try:
                moved = self._act(action) or moved
            except NcfmError as error:
                is_ray_away = is_ray_away or isinstance(error, ClusterUnreachable)
                logger.warning("job %s: %s", action.job.id, error, extra={"action": "failed_action"})
            except Exception:
                # The job border: one job's trouble must not stop the others.
                logger.exception("job %s: %r failed", action.job.id, action, extra={"action": "failed_action"})
        return moved

    def _look(self) -> Snapshot:
        """Ray is asked before the documents are read: a driver that Ray saw ending had written its result before."""
        active = self._store.active()
        rays: dict[str, RayJob | None] = {}
        self.capacity, self.ray_error, self._storage_error = None, "", ""
        try:
            capacity = self._cluster.capacity()
            rays = {job.id: self._cluster.find(submission_id(job)) for job in active}
            self.capacity = capacity
        except ClusterUnreachable as error:
            self.ray_error = str(error)
        attempts = tuple(self._attempt(job, rays.get(job.id)) for job in active)
        followed = {submission_id(job) for job in active}
        self._heartbeats = {key: seen for key, seen in self._heartbeats.items() if key in followed}
        queued = tuple(self._store.queue(limit=QUEUE_WINDOW))
        return Snapshot(now=now(), capacity=self.capacity, attempts=attempts, queued=queued)

    def _attempt(self, job: Job, ray: RayJob | None) -> Attempt:
        try:
            status = self._storage.get_record(attempt_path(job.id, job.attempt, "status.json"), AttemptStatus)
            result = self._storage.get_record(attempt_path(job.id, job.attempt, "result.json"), AttemptResult)
        except StorageError as error:
            self._storage_error = str(error)
            return Attempt(job=job, ray=ray, status=None, result=None, silent_s=0.0, is_readable=False)
        return Attempt(job=job, ray=ray, status=status, result=result, silent_s=self._silence(job, status))

    def _silence(self, job: Job, status: AttemptStatus | None) -> float:
        """Seconds since the heartbeat changed, by our clock: the driver's own may be wrong by any amount."""
        if status is None:
            return math.inf
        seen = self._heartbeats.get(submission_id(job))
        if seen is None or seen[0] != status.heartbeat_at:
            self._heartbeats[submission_id(job)] = (status.heartbeat_at, self._clock())
            return 0.0
        return self._clock() - seen[1]

    def _act(self, action: Action) -> bool:
        match action:
            case Move():
                return self._move(action)
            case Wait(job, reason, message):
                data = {"reason": str(reason), "message": message}
                if self._store.note(job, "waiting", data, reason=reason, message=message):
                    logger.info("job %s waits: %s", job.id, message, extra={"action": "wait", "job": job.id})
            case Report(job, changes, None):
                self._store.report(job, **changes)
            case Report(job, changes, event) if event is not None:
                self._store.note(job, "stage", event, **changes)
            case Submit(job):
                self._submit(job)
            case Stop(job):
                self._stop(job)
            case _:
                raise AssertionError(action)
        return False

    def _move(self, move: Move) -> bool:
        job = move.job
        if job.attempt and move.to in (State.RECOVERING, State.FAILED, State.CANCELLED):
            self._keep_log(job)
        moved = self._store.move(job, move.to, reason=move.reason, message=move.message, **move.changes)
        if moved is None:
            return False
        sentence = f"job {job.id} is {moved.state} (attempt {moved.attempt})"
        logger.info(
            "%s%s", sentence, f": {moved.message}" if moved.message else "", extra={"action": "move", "job": job.id}
        )
        return True

    def _submit(self, job: Job) -> None:
        try:
            self._launch.submit(job, self._storage, self._cluster)
        except SubmissionRefused as error:
            problems = tuple(problem.as_dict() for problem in error.problems)
            record = ErrorRecord(code=error.code, problems=problems)
            self._store.move(job, State.FAILED, reason=Reason.INTERNAL, message=str(error), error=record)
            return
        logger.info("job %s: attempt %d is handed to Ray", job.id, job.attempt, extra={"action": "submit"})
        current = self._store.get(job.id)
        if current is None or current.state.is_terminal or current.attempt != job.attempt:
            # It ended while we were slow: nobody would look after this driver.
            self._cluster.stop(submission_id(job))

    def _stop(self, job: Job) -> None:
        key, at = submission_id(job), self._clock()
        if at - self._stopped_at.get(key, -math.inf) < STOP_PAUSE_S:
            return
        self._cluster.stop(key)
        self._stopped_at = {old: when for old, when in self._stopped_at.items() if at - when < STOP_PAUSE_S} | {key: at}
        logger.info("job %s: Ray is asked to stop attempt %d", job.id, job.attempt, extra={"action": "stop"})

    def _keep_log(self, job: Job) -> None:
        """Keep what Ray holds of a log that the driver could not write itself; Ray will forget it."""
        try:
            path = attempt_path(job.id, job.attempt, "driver.log")
            if self._storage.size(path) is None:
                log = self._cluster.logs(submission_id(job))
                if log:
                    self._storage.create(path, log.encode(errors="replace"))
        except (ClusterUnreachable, StorageError) as error:
            logger.warning("job %s: its log is lost: %s", job.id, error, extra={"action": "log_lost"})

    def _say_trouble(self, trouble: str) -> None:
        """Once when it begins, once when it ends."""
        if trouble != self._said_trouble:
            level = logging.WARNING if trouble else logging.INFO
            logger.log(level, "%s", trouble or "all is well again", extra={"action": "trouble"})
            self._said_trouble = trouble


class _Ended(BaseException):
    """SIGTERM or Ctrl-C: breaks off whatever is waited for, which is no worse than being killed there."""


def main(settings: Settings) -> None:
    """Reconcile until SIGTERM or Ctrl-C.

    Raises:
        StoreError: the database cannot be opened.
        StorageError: the storage root cannot be opened.
    """
    logs.configure(settings.log_format)
    store, storage, cluster = Store(settings.database), Storage(settings.storage_url), Cluster(settings)
    policy = Policy(max_running_jobs=settings.max_running_jobs, max_infra_retries=settings.max_infra_retries)
    controller = Controller(store, storage, cluster, policy=policy, launch=Launch.from_settings(settings))
    lookout = Lookout(store, settings.mlflow_url)

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        logger.info("controller follows %s", settings.ray_url, extra={"action": "start"})
        controller.run(threading.Event(), poll_seconds=settings.poll_seconds, lookout=lookout)
    except _Ended:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        logger.info("controller ends", extra={"action": "end"})
    cluster.close()
    store.close()
