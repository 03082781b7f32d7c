"""What a round looks at: the database's jobs, Ray's word on each, and the documents of their drivers."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

from ncfm_core.errors import StorageError
from service.cluster import Capacity, ClusterUnreachable, RayJob
from service.controller.admission import is_owner_full
from service.controller.crash_points import reached
from service.controller.decision import Attempt, Policy, Publication, Snapshot
from service.controller.launch import Muscle, publisher_id, submission_id
from service.jobs import Job, State
from service.store import Store
from worker.records import AttemptResult, AttemptStatus, attempt_path, checkpoint_root, now
from worker.storage import Storage

QUEUE_WINDOW = 50
"""Queued jobs looked at in one round."""
GPU_PATIENCE_S = 300.0
"""GPUs that the cluster has lost are waited for this long before `gpus: auto` goes without."""
GPU_LOOK_BACK = 20
"""Earlier attempts of a job that are asked what they computed on."""
SLOW_S = 1.0
"""A failure of the storage root that took longer is met once in a round: the next job's would take as long."""
PUBLISH_WINDOW = 8
"""Ended jobs with an MLflow run to complete that are looked at in one round."""
ORPHANED_S = 120.0
"""Workers whose head is gone for good end of themselves within this time."""
EARLIER = 2
"""Attempts before the last one that are looked at too: a stage may outlive its driver, and the pause before the next attempt."""


class Look:
    """Gathers snapshots. All that it remembers is how long drivers and publishers have been as they are."""

    def __init__(
        self,
        store: Store,
        storage: Storage,
        cluster: Muscle,
        *,
        policy: Policy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._storage, self._cluster = store, storage, cluster
        self._policy, self._clock = policy, clock
        self._heartbeats: dict[str, tuple[datetime, float]] = {}
        self._publishing_since: dict[str, float] = {}
        self._unknown_since: dict[str, float] = {}
        self._sought_since: dict[str, float] = {}
        self.storage_error = self.ray_error = ""
        """Why either could not be asked in the last round; empty where it could."""
        self._stuck_on = ""
        """The job whose documents were waited for in vain in this round; the next one begins with another."""
        self.capacity: Capacity | None = None
        """Totals of the cluster in the last round."""
        self.awaited_gpus = 0.0
        """GPUs that the cluster had until a few minutes ago, where it has none."""
        self._last_gpus: float | None = None
        """GPUs that the cluster last had; None before the first look."""
        self._without_gpus_since: float | None = None

    def forget(self) -> None:
        """Start anew, after a time in which nobody looked."""
        self._heartbeats.clear()
        self._publishing_since.clear()
        self._unknown_since.clear()
        self._sought_since.clear()
        self._last_gpus = self._without_gpus_since = None

    def snapshot(self, mlflow_error: str) -> Snapshot:
        """Ray is asked before the documents are read: a driver that Ray saw ending had written its result before."""
        active = self._store.active()
        due = self._store.unpublished(limit=PUBLISH_WINDOW, at=now())
        rays: dict[str, RayJob | None] = {}
        remains: dict[str, tuple[str, ...]] = {}
        # Not always the same job first, or one whose documents alone cannot be read would hide all others.
        active.sort(key=lambda job: job.id == self._stuck_on)
        self.capacity, self.ray_error, self.storage_error, self._stuck_on = None, "", "", ""
        try:
            capacity = self._cluster.capacity()
            names = [*map(submission_id, active), *map(publisher_id, due)]
            rays = {name: self._cluster.find(name) for name in names}
            remains = {submission_id(job): self._remains(job) for job in _ending(active, rays)}
            self.capacity = capacity
        except ClusterUnreachable as error:
            self.ray_error = str(error)
        if self.capacity is not None:
            self.awaited_gpus = self._await_gpus(self.capacity)
        if remains:
            reached("after_remains_asked")
        followed = {submission_id(job) for job in active}
        self._heartbeats = {key: seen for key, seen in self._heartbeats.items() if key in followed}
        self._sought_since = {key: at for key, at in self._sought_since.items() if key in followed}
        self._note_unknown(active, rays)
        return Snapshot(
            now=now(),
            capacity=self.capacity,
            attempts=tuple(self._attempt(job, rays, remains) for job in active),
            queued=tuple(self._queue(active)),
            awaits_gpus=self.awaited_gpus > 0,
            publications=tuple(self._publications(due, rays)),
            mlflow_error=mlflow_error,
        )

    def _await_gpus(self, capacity: Capacity) -> float:
        """GPUs that were there and may come back: after a restart of the head its nodes join it one by one."""
        if self._last_gpus is None:
            seen = self._store.sighting()
            self._last_gpus = (seen.gpus or 0.0) if seen else 0.0
        if capacity.gpus > 0:
            self._last_gpus, self._without_gpus_since = capacity.gpus, None
            return 0.0
        # Since the first answer without them: head, nodes and controller may have been away together, for any time.
        if self._without_gpus_since is None:
            self._without_gpus_since = self._clock()
        if self._clock() - self._without_gpus_since >= GPU_PATIENCE_S:
            self._last_gpus = 0.0
        return self._last_gpus

    def _queue(self, active: list[Job]) -> list[Job]:
        """Those that may start next; where owners have as many running as may, also those that this lets pass."""
        window = self._store.queue(limit=QUEUE_WINDOW)
        running = Counter(job.owner for job in active)
        full = [owner for owner, count in running.items() if is_owner_full(count, self._policy)]
        if not any(job.owner in full for job in window):
            return window
        passing = self._store.queue(limit=QUEUE_WINDOW, except_owners=full)
        found = {job.id: job for job in (*window, *passing)}
        return sorted(found.values(), key=lambda job: (job.rank, job.id))

    def _remains(self, job: Job) -> tuple[str, ...]:
        """What is left of a job by Ray's account: of its last attempt, and of those just before it, whose drivers were lost.

        A head that has been restarted knows nothing of earlier attempts: what they ran is given the time that it takes to notice.
        """
        since = now() - timedelta(seconds=ORPHANED_S)
        found: list[str] = []
        for attempt in self._store.attempts(job.id)[-EARLIER - 1 :]:
            name = submission_id(job, attempt.number)
            found += self._cluster.remains(name)
            is_recent = attempt.ended_at is not None and attempt.ended_at > since
            if attempt.number < job.attempt and is_recent and self._cluster.find(name) is None:
                found.append(f"attempt {attempt.number}, which Ray does not know any more")
        return tuple(found)

    def _attempt(self, job: Job, rays: dict[str, RayJob | None], remains: dict[str, tuple[str, ...]]) -> Attempt:
        name = submission_id(job)
        if self._stuck_on:
            return self._unreadable(job, rays.get(name), self.storage_error)
        started = self._clock()
        try:
            # The result first: the status that is read after it is the last one.
            result = self._storage.get_record(attempt_path(job.id, job.attempt, "result.json"), AttemptResult)
            status = self._storage.get_record(attempt_path(job.id, job.attempt, "status.json"), AttemptStatus)
            is_asked = job.state is State.CANCELLING and self._has_stop_request(job)
            gpus = self._gpus_before(job, status)
            has_checkpoints = self._has_checkpoints(job)
        except StorageError as error:
            self.storage_error = str(error)
            if self._clock() - started >= SLOW_S:
                self._stuck_on = job.id
            return self._unreadable(job, rays.get(name), str(error))
        if result is not None:
            reached("after_result_read")
        return Attempt(
            job=job,
            ray=rays.get(name),
            status=status,
            result=result,
            silent_s=self._silence(name, status),
            has_stop_request=is_asked,
            unknown_s=self._clock() - self._unknown_since.get(name, self._clock()),
            sought_s=self._sought(job),
            has_checkpoints=has_checkpoints,
            remains=remains.get(name),
            gpus=gpus,
        )

    def _sought(self, job: Job) -> float:
        """Seconds in which the end of a job that is being cancelled could be sought, since the last time it could not."""
        if job.state is not State.CANCELLING or self.capacity is None:
            self._sought_since.pop(submission_id(job), None)
            return 0.0
        return self._clock() - self._sought_since.setdefault(submission_id(job), self._clock())

    def _unreadable(self, job: Job, ray: RayJob | None, trouble: str) -> Attempt:
        self._sought_since.pop(submission_id(job), None)
        return Attempt(job=job, ray=ray, status=None, result=None, silent_s=0.0, is_readable=False, trouble=trouble)

    def _note_unknown(self, active: list[Job], rays: dict[str, RayJob | None]) -> None:
        """Since when Ray knows nothing of drivers that are being cancelled; counted anew after a time in which it was away.

        This controller hands none of them over any more. What another one has under way is over when it is over here.
        """
        # Not rays: what was asked before Ray went away says nothing of now.
        asked = [] if self.capacity is None else [submission_id(job) for job in active if job.state is State.CANCELLING]
        since = {name: self._unknown_since.get(name, self._clock()) for name in asked if rays.get(name) is None}
        self._unknown_since = since

    def _gpus_before(self, job: Job, status: AttemptStatus | None) -> float | None:
        """What the tasks of a job take, or took in the last attempt that said so where the next one is to start."""
        if job.demand.gpus != "auto":
            return None
        if status is not None and status.gpus is not None:
            return status.gpus
        if job.state not in (State.STARTING, State.RECOVERING):
            return None
        for attempt in range(job.attempt - 1, max(0, job.attempt - 1 - GPU_LOOK_BACK), -1):
            earlier = self._storage.get_record(attempt_path(job.id, attempt, "status.json"), AttemptStatus)
            if earlier is not None and earlier.gpus is not None:
                return earlier.gpus
        return None

    def _has_checkpoints(self, job: Job) -> bool | None:
        if job.state is not State.CANCELLING or job.cancel is None or not job.cancel.checkpoint:
            return None
        return bool(self._storage.list(checkpoint_root(job.id)))

    def _has_stop_request(self, job: Job) -> bool:
        return self._storage.size(attempt_path(job.id, job.attempt, "stop.json")) is not None

    def _silence(self, name: str, status: AttemptStatus | None) -> float:
        """Seconds since the heartbeat changed, by our clock: the driver's own may be wrong by any amount."""
        if status is None:
            return math.inf
        seen = self._heartbeats.get(name)
        if seen is None or seen[0] != status.heartbeat_at:
            self._heartbeats[name] = (status.heartbeat_at, self._clock())
            return 0.0
        return self._clock() - seen[1]

    def _publications(self, due: list[Job], rays: dict[str, RayJob | None]) -> list[Publication]:
        since: dict[str, float] = {}
        found = []
        for job in due:
            name = publisher_id(job)
            ray = rays.get(name)
            if ray is not None and not ray.is_terminal:
                since[name] = self._publishing_since.get(name, self._clock())
            found.append(Publication(job=job, ray=ray, running_s=self._clock() - since.get(name, self._clock())))
        self._publishing_since = since
        return found


def _ending(active: list[Job], rays: dict[str, RayJob | None]) -> list[Job]:
    """Jobs that are being cancelled and whose driver does not run by Ray's word: is anything else of them left?"""
    found = ((job, rays.get(submission_id(job))) for job in active if job.state is State.CANCELLING)
    return [job for job, ray in found if ray is None or ray.is_terminal]
