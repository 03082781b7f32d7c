"""The controller's process: `ncfm controller`."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from ncfm_core.errors import NcfmError
from service import logs
from service.cluster import Cluster
from service.controller.crash_points import arm, reached
from service.controller.decision import Policy
from service.controller.housekeeping import keep_house
from service.controller.launch import Launch
from service.controller.loop import Controller
from service.controller.sightings import Lookout
from service.controller.tenure import Tenure
from service.retention import Limits
from service.settings import STORAGE_PATIENCE_S, Settings
from service.store import Store
from worker.storage import Storage

logger = logging.getLogger("ncfm.controller")


class _Ended(BaseException):
    """SIGTERM or Ctrl-C: breaks off whatever is waited for, which is no worse than being killed there."""


def main(settings: Settings) -> None:
    """Reconcile until SIGTERM or Ctrl-C.

    Raises:
        StoreError: the database cannot be opened.
        StorageError: the storage root cannot be opened.
        UnknownCrashPoint: `crash_at` names no point.
    """
    logs.configure(settings.log_format)
    arm(settings.crash_at)
    store, cluster = Store(settings.database), Cluster(settings)
    storage = Storage(settings.storage_url, patience=STORAGE_PATIENCE_S)
    tenure = Tenure(store, seconds=settings.lease_seconds)
    launch = Launch.from_settings(settings)
    controller = Controller(store, storage, cluster, policy=policy_of(settings), launch=launch, tenure=tenure)
    lookout, over = Lookout(store, settings.mlflow_url), threading.Event()
    house = {"is_active": tenure.is_held, "stop": over}
    threading.Thread(
        target=keep_house, args=(store, storage, Limits.from_settings(settings)), kwargs=house, daemon=True
    ).start()

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        logger.info("controller follows %s", settings.ray_url, extra={"action": "start"})
        controller.run(over, poll_seconds=settings.poll_seconds, lookout=lookout)
    except _Ended:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        over.set()
        logger.info("controller ends", extra={"action": "end"})
    reached("before_release")
    _release(tenure)
    cluster.close()
    store.close()


def policy_of(settings: Settings) -> Policy:
    return Policy(
        max_running_jobs=settings.max_running_jobs,
        max_running_per_owner=settings.max_running_per_owner,
        max_infra_retries=settings.max_infra_retries,
        max_error_retries=settings.max_error_retries,
    )


def _release(tenure: Tenure) -> None:
    try:
        tenure.release()
    except NcfmError as error:
        # Another controller waits until it is over, then.
        logger.warning("the lease is not released: %s", error, extra={"action": "end"})
