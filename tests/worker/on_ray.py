"""Programs that tests run in a process of their own, on a Ray of their own: `python -m tests.worker.on_ray NAME FOLDER`.

Each prints one JSON object. Ray takes its settings when it is imported, and one of them ends on a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ncfm_core.errors import NcfmError
from ncfm_core.progress import Progress
from ncfm_core.submission import resolve
from worker.history import Notice, Trouble
from worker.settings import prepare_own_ray
from worker.site import Site
from worker.storage import Storage

SPEC = resolve(
    {
        "dataset": "digits",
        "ipc": 1,
        "search": {"trials": 3, "space": {"image_lr": {"loguniform": [1e-3, 1e-1]}}, "scheduler": "random"},
    }
)


@contextmanager
def cluster(**options: Any) -> Iterator[None]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ncfm-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", namespace="ncfm", include_dashboard=False, log_to_driver=False, _temp_dir=folder, num_cpus=2, **options)  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def site(folder: Path) -> Site:
    return Site(
        job_id="J",
        attempt=1,
        storage_url=str(folder),
        device="cpu",
        threads=1,
        checkpoint=SPEC.checkpoint,
        code_version="test",
    )


def stages_that_say_their_process() -> None:
    """Called in each process of the cluster: puts such stages in the place of the real ones, which import torch."""

    def teacher(*_: object, **__: object) -> Iterator[Notice]:
        yield Notice(str(os.getpid()))

    stand_in = types.ModuleType("worker.stages")
    stand_in.teacher = teacher  # type: ignore[attr-defined]
    sys.modules["worker.stages"] = stand_in


def processes(folder: Path) -> dict[str, object]:
    """Which processes run three tasks each, one after the other, on CPUs and on GPUs."""
    with cluster(num_gpus=2, runtime_env={"worker_process_setup_hook": stages_that_say_their_process}):
        from worker.tasks import Demand, fetch, start

        def process(gpus: float) -> str:
            task = start("teacher", site(folder), None, {}, demand=Demand(1, gpus), label="task")
            said = [fetch(each) for each in task]
            return next(each.message for each in said if isinstance(each, Notice) and each.message.isdigit())

        return {f"{gpus:g}": [process(gpus) for _ in range(3)] for gpus in (0.0, 1.0)}


def trial(params: dict[str, Any], **given: Any) -> None:
    """Stands in the place of a real one: the storage root says which of them are to be lost, or to fail, and how often."""
    from ray import tune

    search, folder = given["spec"].search, Path(given["site"].storage_url)
    for rung in range(1, search.rungs + 1):
        time.sleep(0.2)
        for kind in ("lose", "fail"):
            left = sorted(folder.glob(f"{kind}-*"))
            if rung == search.rungs and left:
                left[0].unlink(missing_ok=True)
                if kind == "lose":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("a trial of its own accord")
        tune.report({"accuracy": 50.0 + rung, "step": rung})


def searches(folder: Path) -> dict[str, object]:
    """What becomes of searches whose trials or whose driver meet something, and what they commit."""
    from worker import search as module
    from worker.tasks import Demand
    from worker.trials import TRIALS_FILE, read_trials

    def outcome(name: str, *, at_report: int = 0, again: int = 2, **meets: int) -> dict[str, object]:
        module.MAX_FAILURES = again
        root = folder / name
        root.mkdir()
        for kind, times in meets.items():
            for number in range(times):
                (root / f"{kind}-{number}").touch()
        heard = 0

        def report(event: Progress | Trouble) -> None:
            nonlocal heard
            heard += 1
            if heard == at_report:
                os.kill(os.getpid(), signal.SIGINT if name == "interrupted" else signal.SIGUSR1)

        found: dict[str, object] = {"ended": "committed"}
        try:
            result = module.search(
                site(root),
                Storage(str(root)),
                None,
                key="sha256:" + "a" * 64,
                spec=SPEC,
                teachers=(),
                demand=Demand(1, 0.0),
                report=report,
                check=lambda: None,
            )
            file = next(each for each in result.files if each.name == TRIALS_FILE)
            trials = read_trials(Storage(str(root)).read_file(file))
            found |= {"rungs": [each.rungs() for each in trials], "lost": result.figures["lost"]}
        except (NcfmError, KeyboardInterrupt) as error:
            found = {"ended": type(error).__name__, "message": str(error)}
        return found | {"results": Storage(str(root)).list("results")}

    with cluster():
        module._run_trial = trial
        return {
            "lost once": outcome("lost-once", lose=1),
            "lost for good": outcome("lost-for-good", lose=1, again=0),
            "failed": outcome("failed", fail=1, again=0),
            "signalled": outcome("signalled", at_report=2),
            # Last: it leaves its trials behind.
            "interrupted": outcome("interrupted", at_report=2),
        }


if __name__ == "__main__":
    # Ctrl-C must come whatever the parent made of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_own_ray()
    told = {"processes": processes, "searches": searches}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(told) + "\n")
