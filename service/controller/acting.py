"""Carries out what was decided. Every action may be done twice, so the controller can be killed between any two."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from ncfm_core.errors import StorageError
from service.cluster import ClusterUnreachable, SubmissionRefused
from service.controller.admission import wait
from service.controller.crash_points import CrashPoint, reached
from service.controller.decision import (
    Action,
    Move,
    Publish,
    Published,
    Report,
    RequestStop,
    Stop,
    StopPublisher,
    Submit,
    Wait,
)
from service.controller.endings import STORAGE_FULL, publication
from service.controller.launch import Launch, Muscle, publisher_id, submission_id
from service.controller.tenure import Tenure
from service.jobs import Job, Reason, State
from service.store import Store
from worker.records import ErrorRecord, StopRequest, attempt_path
from worker.storage import Storage

logger = logging.getLogger("ncfm.controller")

STOP_PAUSE_S = 5.0
"""Before Ray is asked again to stop the same driver: it needs a while itself."""
AROUND_MOVES: dict[State, tuple[CrashPoint, CrashPoint]] = {
    State.STARTING: ("before_claim", "after_claim"),
    State.RUNNING: ("before_move_running", "after_move_running"),
    State.RECOVERING: ("before_move_recovering", "after_move_recovering"),
}
AROUND_END: tuple[CrashPoint, CrashPoint] = ("before_terminal_move", "after_terminal_move")


class Act:
    """The controller's hands.

    Raises:
        FencedError: by `do`, when another controller has taken over: nothing was done.
    """

    def __init__(
        self,
        store: Store,
        storage: Storage,
        cluster: Muscle,
        *,
        launch: Launch,
        tenure: Tenure | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._storage, self._cluster = store, storage, cluster
        self._launch, self._tenure, self._clock = launch, tenure, clock
        self._stopped_at: dict[str, float] = {}

    def do(self, action: Action) -> bool:
        """Carry out one action; whether it moved a job."""
        match action:
            case Move():
                return self._move(action)
            case Wait():
                self._wait(action)
            case Report(job, changes, None):
                self._store.report(job, **changes)
            case Report(job, changes, event) if event is not None:
                self._store.note(job, "stage", event, **changes)
                reached("after_stage_noted")
            case Submit(job, gpus):
                self._submit(job, gpus)
            case RequestStop():
                self._request_stop(action)
            case Stop(job):
                self._stop(job, submission_id(job))
            case Publish(job):
                self._publish(job)
            case StopPublisher(job):
                self._stop(job, publisher_id(job))
            case Published():
                self._note_published(action)
            case _:
                raise AssertionError(action)
        return False

    def say_storage(self, job: Job, error: StorageError) -> None:
        """Tell that a job cannot start for want of storage; it costs it nothing."""
        is_full = error.code == STORAGE_FULL
        reason = Reason.STORAGE_FULL if is_full else Reason.STORAGE_UNAVAILABLE
        waiting = wait(job, reason, f"waits for the storage root: {error}")
        if waiting is not None:
            self._wait(waiting)

    def _wait(self, waiting: Wait) -> None:
        job, reason, message = waiting.job, waiting.reason, waiting.message
        data = {"reason": str(reason), "message": message}
        if self._store.note(job, "waiting", data, reason=reason, message=message):
            logger.info("job %s waits: %s", job.id, message, extra={"action": "wait", "job": job.id})
            reached("after_wait_noted")

    def _move(self, move: Move) -> bool:
        job = move.job
        before, after = AROUND_MOVES.get(move.to, AROUND_END)
        if job.attempt and move.to in (State.RECOVERING, State.FAILED, State.CANCELLED):
            self._keep_log(job)
        reached(before)
        moved = self._store.move(
            job, move.to, reason=move.reason, message=move.message, detail=move.detail, **move.changes
        )
        if moved is None:
            return False
        reached(after)
        sentence = f"job {job.id} is {moved.state} (attempt {moved.attempt})"
        logger.info(
            "%s%s", sentence, f": {moved.message}" if moved.message else "", extra={"action": "move", "job": job.id}
        )
        return True

    def _submit(self, job: Job, gpus: float | None) -> None:
        reached("before_submit")
        self._check()
        try:
            self._launch.submit(job, self._storage, self._cluster, gpus=gpus)
        except SubmissionRefused as error:
            self._refused(job, error)
            return
        reached("after_submit")
        logger.info("job %s: attempt %d is handed to Ray", job.id, job.attempt, extra={"action": "submit"})
        current = self._store.get(job.id)
        if current is None or current.state.is_terminal or current.attempt != job.attempt:
            # It ended while we were slow: nobody would look after this driver.
            self._cluster.stop(submission_id(job))

    def _refused(self, job: Job, error: SubmissionRefused) -> None:
        record = ErrorRecord(code=error.code, problems=tuple(problem.as_dict() for problem in error.problems))
        ended = publication(job, None)
        self._store.move(job, State.FAILED, reason=Reason.INTERNAL, message=str(error), error=record, publication=ended)

    def _request_stop(self, action: RequestStop) -> None:
        job = action.job
        reached("before_stop_json")
        self._check()
        request = StopRequest(checkpoint=action.request.checkpoint, requested_at=action.request.requested_at)
        self._storage.create_record(attempt_path(job.id, job.attempt, "stop.json"), request)
        reached("after_stop_json")
        logger.info("job %s: attempt %d is asked to end", job.id, job.attempt, extra={"action": "stop"})

    def _stop(self, job: Job, name: str) -> None:
        at = self._clock()
        if at - self._stopped_at.get(name, -math.inf) < STOP_PAUSE_S:
            return
        reached("before_stop")
        self._check()
        self._cluster.stop(name)
        reached("after_ray_stop")
        self._stopped_at = {old: when for old, when in self._stopped_at.items() if at - when < STOP_PAUSE_S} | {
            name: at
        }
        logger.info("job %s: Ray is asked to stop %s", job.id, name, extra={"action": "stop"})

    def _publish(self, job: Job) -> None:
        reached("before_publish_submit")
        self._check()
        try:
            self._launch.publish(job, self._cluster)
        except SubmissionRefused as error:
            self._note_published(Published(job, "error", None, str(error)))
            return
        reached("after_publish_submit")
        logger.info("job %s: %s is handed to Ray", job.id, publisher_id(job), extra={"action": "publish"})

    def _note_published(self, action: Published) -> None:
        job, number = action.job, action.job.publish_tries + 1
        reached("before_publish_noted")
        data = {"publication": action.publication, "try": number, "message": action.message}
        self._store.note(
            job,
            "published",
            data,
            publication=action.publication,
            publish_tries=number,
            publish_at=action.publish_at,
        )
        reached("after_publish_noted")
        logger.info("job %s: %s", job.id, action.message, extra={"action": "published", "job": job.id})

    def _keep_log(self, job: Job) -> None:
        """Keep what Ray holds of a log that the driver could not write itself; Ray will forget it."""
        reached("before_log_kept")
        try:
            path = attempt_path(job.id, job.attempt, "driver.log")
            if self._storage.size(path) is None:
                log = self._cluster.logs(submission_id(job))
                if log:
                    self._storage.create(path, log.encode(errors="replace"))
        except (ClusterUnreachable, StorageError) as error:
            logger.warning("job %s: its log is lost: %s", job.id, error, extra={"action": "log_lost"})
        reached("after_log_kept")

    def _check(self) -> None:
        """What is done outside the database cannot be taken back by it: only the active controller may."""
        if self._tenure is not None:
            self._tenure.check()
