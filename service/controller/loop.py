"""The controller's loop: it looks at everything, lets `policy.decide` decide, and acts.

It keeps nothing of its own that a restart would miss: the database says what was decided, Ray and the storage root say what
became of it. Several may run on one database: the holder of the lease is active, the others stand by.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ncfm_core.errors import NcfmError, StorageError
from service.cluster import Capacity, ClusterUnreachable
from service.controller.acting import Act
from service.controller.crash_points import reached
from service.controller.decision import Action, OnRay, OnStorage, Policy, Submit, Wait
from service.controller.launch import Launch, Muscle
from service.controller.looking import SLOW_S, Look
from service.controller.policy import decide
from service.controller.sightings import Lookout
from service.controller.tenure import Tenure
from service.database import StoreError
from service.leases import FencedError
from service.store import Store
from worker.storage import Storage

logger = logging.getLogger("ncfm.controller")

AFTER_MOVE_S = 0.02
"""Pause after a round that moved something: what follows from it need not wait for the next poll."""
MAX_WAITS = 4
"""Jobs that are told in one round why they wait: what is said of all of them must not hold up those that run."""


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
        tenure: Tenure | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Put it together.

        Args:
            store: the database; fenced where there is a tenure.
            storage: the storage root.
            cluster: Ray.
            policy: limits.
            launch: how drivers are started.
            tenure: its hold on the lease; None where there can be no other controller.
            clock: seconds that never go back.
        """
        self._policy, self._tenure = policy, tenure
        self._look = Look(store, storage, cluster, policy=policy, clock=clock)
        self._act = Act(store, storage, cluster, launch=launch, tenure=tenure, clock=clock)
        self._clock, self._said_trouble = clock, ""
        self._token: int | None = None
        self.mlflow_error = ""
        """Why MLflow could not be reached when it was last asked."""

    @property
    def capacity(self) -> Capacity | None:
        """Totals of the cluster in the last round."""
        return self._look.capacity

    @property
    def ray_error(self) -> str:
        """Why Ray could not be asked in the last round; empty where it could."""
        return self._look.ray_error

    def run(self, stop: threading.Event, *, poll_seconds: float, lookout: Lookout | None = None) -> None:
        """Rounds until `stop` is set, or looks at the lease while another controller has it."""
        while not stop.is_set():
            stop.wait(self._turn(poll_seconds, lookout))

    def _turn(self, poll_seconds: float, lookout: Lookout | None) -> float:
        """One round, or one look at the lease; the pause after it."""
        try:
            if self._tenure is not None and not self._tenure.keep():
                return self._stand_by(f"{self._tenure.other} is the active controller; this one stands by")
            reached("after_lease")
            moved = self.round()
            if lookout is not None:
                reached("before_sighting")
                lookout.note(self.capacity, self.ray_error, awaited_gpus=self._look.awaited_gpus)
                self.mlflow_error = lookout.mlflow_error
                reached("after_sighting")
            self._say_trouble(self._look.ray_error or self._look.storage_error)
        except FencedError as error:
            return self._stand_by(str(error))
        except NcfmError as error:
            # The database is away: nothing can be decided until it is back.
            self._say_trouble(str(error))
            return poll_seconds
        except Exception as error:
            # The border of a round: ending here would only mean to end again after every restart.
            trouble = f"a round failed on an error of our own: {type(error).__name__}: {error}"
            if trouble != self._said_trouble:
                logger.exception("a round failed", extra={"action": "failed_round"})
            self._say_trouble(trouble)
            return poll_seconds
        return AFTER_MOVE_S if moved else poll_seconds

    def _stand_by(self, why: str) -> float:
        assert self._tenure is not None
        self._tenure.lose()
        self._say_trouble(why)
        return self._tenure.standby_s

    def round(self) -> bool:
        """Look, decide, act once; whether a job was moved.

        Raises:
            FencedError: another controller has taken over; nothing more was done.
            StoreError: the database cannot be used.
        """
        if self._tenure is not None and self._tenure.token != self._token:
            self._look.forget()
            self._token = self._tenure.token
        snapshot = self._look.snapshot(self.mlflow_error)
        reached("after_look")
        moved = is_ray_away = is_storage_away = False
        waits = 0
        for action in decide(snapshot, self._policy):
            waits += isinstance(action, Wait)
            is_vain = (is_ray_away and isinstance(action, OnRay)) or (is_storage_away and isinstance(action, OnStorage))
            if (isinstance(action, Wait) and waits > MAX_WAITS) or is_vain:
                # The next round tells more of them; and each question to Ray would wait as long for the same answer.
                continue
            started = self._clock()
            try:
                moved = self._act.do(action) or moved
            except (FencedError, StoreError):
                raise
            except NcfmError as error:
                is_ray_away = is_ray_away or isinstance(error, ClusterUnreachable)
                is_slow = self._clock() - started >= SLOW_S
                is_storage_away = is_storage_away or (is_slow and isinstance(error, StorageError))
                self._failed(action, error)
            except Exception:
                # The job border: one job's trouble must not stop the others.
                logger.exception("job %s: %r failed", action.job.id, action, extra={"action": "failed_action"})
        return moved

    def _failed(self, action: Action, error: NcfmError) -> None:
        if isinstance(action, Submit) and isinstance(error, StorageError):
            self._act.say_storage(action.job, error)
        else:
            logger.warning("job %s: %s", action.job.id, error, extra={"action": "failed_action"})

    def _say_trouble(self, trouble: str) -> None:
        """Once when it begins, once when it ends."""
        if trouble != self._said_trouble:
            level = logging.WARNING if trouble else logging.INFO
            logger.log(level, "%s", trouble or "all is well again", extra={"action": "trouble"})
            self._said_trouble = trouble
