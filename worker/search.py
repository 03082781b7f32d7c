"""The search: Ray Tune over fields of the method, judged on training data that was held out; the test set is never looked at."""

from __future__ import annotations

import contextlib
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from ncfm_core.progress import Progress
from ncfm_core.space import LogUniform, RandInt, SearchSpec, Uniform
from ncfm_core.spec import JobSpec
from worker.environment import code_version
from worker.history import HISTORY_FILE, History, Trouble
from worker.patience import when_there_is_room
from worker.plan import held_out
from worker.records import StageResult, now, object_folder
from worker.settings import prepare_search, prepare_trial
from worker.site import Site
from worker.storage import Storage
from worker.tasks import Demand
from worker.trials import (
    BEST_FILE,
    TRIALS_FILE,
    Trial,
    best_of,
    best_spec,
    check_complete,
    with_params,
    write_trial,
)

REDUCTION_FACTOR = 2
"""ASHA keeps the better half at each rung."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILURE = re.compile(r"^Failure # \d+ \(occurred at .*\)$", re.MULTILINE)
"""Above the text of each failure of a trial, in Tune's file of them."""
_TRACE = re.compile(r"^\S+\(\) \(pid=\d+, ip=.*\)$", re.MULTILINE)
"""Above the frames of an error that was raised in a process of the cluster."""
_DIED = "The actor died"
MAX_FAILURES = 2
"""Times that one trial is begun again after it failed or was lost."""


def search(
    site: Site,
    storage: Storage,
    dataset: Any,
    *,
    key: str,
    spec: JobSpec,
    teachers: Sequence[StageResult],
    demand: Demand,
    report: Callable[[Progress | Trouble], None],
    check: Callable[[], None],
) -> StageResult:
    """Run the trials from this process and commit what they found: `best.yaml`, `trials.jsonl`.

    Args:
        site: for whom.
        storage: where results are.
        dataset: reference to the data in the object store.
        key: of the result.
        spec: with a search.
        teachers: trained on what is left of the training data.
        demand: of each trial.
        report: told of every rung, and of a storage that is full.
        check: called several times a second; what it raises ends the search.

    Raises:
        SearchCutError: not all trials came to their end; nothing is committed.
        SearchError: all of them failed.
    """
    assert spec.search is not None
    started = time.monotonic()
    history = History()

    def keep(progress: Progress) -> None:
        history.add(progress)
        report(progress)

    trials = _tune(site, dataset, spec=spec, teachers=teachers, demand=demand, report=keep, check=check)
    check_complete(trials, spec.search.trials)
    best = best_of(trials)
    document = best_spec(spec, best.params).document()
    files = {
        BEST_FILE: yaml.safe_dump(document, sort_keys=False).encode(),
        TRIALS_FILE: b"".join(write_trial(trial) for trial in trials),
        HISTORY_FILE: history.encode(),
    }
    seconds = round(time.monotonic() - started, 3)
    folder = object_folder(site.built_by, "search", key)

    def write() -> StageResult:
        result = StageResult(
            key=key,
            stage="search",
            built_by=site.built_by,
            created_at=now(),
            files=storage.write_files(folder, files),
            figures={
                "best": best.params,
                "trial": best.index,
                "validation_accuracy": best.accuracy(),
                "trials": len(trials),
                "lost": [trial.error for trial in trials if trial.error],
            },
            seconds=seconds,
            environment={"device": site.device, "threads": site.threads, "code_version": code_version()},
        )
        return storage.commit(result)

    return _patiently(write, report, check)


def _patiently(
    write: Callable[[], StageResult], report: Callable[[Trouble], None], check: Callable[[], None]
) -> StageResult:
    tries = when_there_is_room(write, "the result of search")
    while True:
        try:
            report(next(tries))
        except StopIteration as stop:
            value: StageResult = stop.value
            return value
        check()


def ignore(progress: Progress) -> None:
    """Where reports go when nobody listens."""


def unchecked() -> None:
    """The check where nobody asks."""


class _Collector(tune.Callback):
    """Takes what the trials report, in the driver's process."""

    def __init__(
        self, total: int, rungs: int, report: Callable[[Progress], None], check: Callable[[], None] = unchecked
    ) -> None:
        self.trials: dict[str, Trial] = {}
        self._total, self._rungs, self._report, self._check = total, rungs, report, check

    def __reduce__(self) -> tuple[type, tuple[int, int, Callable[[Progress], None]]]:
        """Tune saves its callbacks for a restore, which is not used here: whom to tell stays behind."""
        return type(self), (self._total, self._rungs, ignore)

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Tune's loop turns several times a second, whatever the trials do."""
        self._check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._trial(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        row = {"step": float(result["step"]), "time": round(time.time() * 1000), "accuracy": float(result["accuracy"])}
        self._trial(trial).rows.append(row)
        self._tell(self._trial(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._trial(trial).is_over = True
        self._tell(self._trial(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It begins again from its start."""
        self._trial(trial).rows.clear()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        entry, text = self._trial(trial), _last_failure(trial)
        raised = _raised_in(text)
        entry.is_over, entry.is_lost = True, raised is None
        entry.error = (raised or text.partition("\n")[0] or "lost")[:400]

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """Those that never came to run say so too: Tune tells nobody of them."""
        for trial in trials:
            entry = self._trial(trial)
            if trial.status == "ERROR" and not entry.error:
                lines = str(trial.get_error() or "Ray Tune could not start it").strip().splitlines()
                entry.error, entry.is_lost = f"lost: {lines[-1]}"[:400], True

    def _trial(self, trial: Any) -> Trial:
        params = dict(trial.config)
        return self.trials.setdefault(trial.trial_id, Trial(index=len(self.trials), params=params))

    def _tell(self, trial: Trial) -> None:
        """A trial that was stopped early counts as if it had run to its end."""
        done = sum(self._rungs if each.is_over else each.rungs() for each in self.trials.values())
        best = max(each.accuracy() for each in self.trials.values())
        metrics = {"accuracy": trial.accuracy(), "best_accuracy": best}
        self._report(Progress(done, self._total * self._rungs, "rung", metrics))


def _last_failure(trial: Any) -> str:
    """The text of a trial's last failure, from where Tune has just put it: `trial.get_error` looks where it comes to later.

    The error itself lies beside it as a pickle, which is not for us to load.
    """
    path = trial.error_file
    if not path or not Path(path).exists():
        return ""
    return _FAILURE.split(_COLOUR.sub("", Path(path).read_text(errors="replace")))[-1].strip()


def _raised_in(text: str) -> str | None:
    """What a trial itself raised, as `Name: first line of its message`; None for a failure of where it ran.

    Ray tells the one by a trace of the process that raised it, and the other by a sentence, with a trace in it where an actor
    could not be made.
    """
    traces = list(_TRACE.finditer(text))
    if not traces or text.startswith(_DIED):
        return None
    # Behind the frames of the last one: those before it are its causes.
    lines = text[traces[-1].end() :].splitlines()
    name, colon, message = next((line for line in lines if line and not line.startswith(" ")), "").partition(": ")
    return name.rpartition(".")[2] + colon + message


def _tune(
    site: Site,
    dataset: Any,
    *,
    spec: JobSpec,
    teachers: Sequence[StageResult],
    demand: Demand,
    report: Callable[[Progress], None],
    check: Callable[[], None],
) -> list[Trial]:
    search = spec.search
    assert search is not None
    prepare_search()
    collector = _Collector(search.trials, search.rungs, report, check)
    # The reference goes inside a list: given bare, every trial would get the data copied into its arguments.
    trainable = tune.with_parameters(_run_trial, site=site, dataset=[dataset], spec=spec, teachers=list(teachers))
    with tempfile.TemporaryDirectory(prefix="ncfm-search-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": demand.cpus, "gpu": demand.gpus}),
            param_space={name: _domain(entry) for name, entry in search.space.items()},
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=search.trials,
                scheduler=_scheduler(search),
                search_alg=BasicVariantGenerator(random_state=spec.seed),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="search",
                callbacks=[collector],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        )
        # Tune prints tables to the output of the process, which belongs to the caller.
        with contextlib.redirect_stdout(io.StringIO()):
            tuner.fit()
    return sorted(collector.trials.values(), key=lambda trial: trial.index)


def _domain(entry: Uniform | LogUniform | RandInt | tuple[Any, ...]) -> Any:
    if isinstance(entry, Uniform):
        return tune.uniform(*entry.uniform)
    if isinstance(entry, LogUniform):
        return tune.loguniform(*entry.loguniform)
    if isinstance(entry, RandInt):
        return tune.randint(*entry.randint)
    return tune.choice(list(entry))


def _scheduler(search: SearchSpec) -> Any:
    if search.scheduler == "random":
        return cast(Any, FIFOScheduler)()
    return ASHAScheduler(
        time_attr="training_iteration", grace_period=1, max_t=search.rungs, reduction_factor=REDUCTION_FACTOR
    )


def _run_trial(
    params: dict[str, Any], *, site: Site, dataset: list[Any], spec: JobSpec, teachers: list[StageResult]
) -> None:
    """One trial, in a process of the cluster: distil a part of the way, judge, report, go on."""
    import torch

    from ncfm_core.distill import Distillation
    from ncfm_core.evaluate import evaluate
    from ncfm_core.progress import finish
    from worker.building import read_pool

    prepare_trial()
    search, split = spec.search, held_out(spec)
    assert search is not None and split is not None
    torch.set_num_threads(site.threads)
    device, entry = torch.device(site.device), spec.evaluate[0]
    data = ray.get(dataset[0]).hold_out(split[0], seed=split[1])
    pool = read_pool(Storage(site.storage_url), teachers, model=spec.model, dataset=data, device=device)
    method = with_params(spec.method, params | {"steps": search.steps})
    limit = site.memory_limit_bytes
    task = Distillation(data, pool, method, ipc=spec.ipc, seed=spec.seed, device=device, memory_limit=limit)
    for rung in range(1, search.rungs + 1):
        for _ in task.run(until=round(task.total * rung / search.rungs)):
            pass
        synthetic = task.result()
        images, labels = synthetic.decode()
        students = evaluate(
            images.clamp(0, 1),
            labels,
            data,
            model=entry.model,
            training=entry.training.model_copy(update={"epochs": search.epochs}),
            students=search.students,
            tests=1,
            seed=spec.seed,
            device=device,
            targets=synthetic.soft_labels,
        )
        tune.report({"accuracy": statistics.fmean(finish(students).last), "step": task.step})
