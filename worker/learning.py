"""The two stages that run for long and save themselves on the way: a teacher, and the distillation.

Both end after any step when they are asked to stop. The distillation also ends when the job's wall time is over: what it has
then is a result of its own, under a key of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict

import safetensors.torch
import torch
from pydantic import JsonValue

from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.errors import DamagedError, LimitError, StorageError
from ncfm_core.pools import TeacherTraining
from ncfm_core.progress import Progress
from ncfm_core.spec import ModelSpec, NcfmSpec, TrainingSpec
from ncfm_core.synthetic import to_state
from worker.building import IMAGES_FILE, WEIGHTS_FILE, Building, how_computed, read_pool
from worker.checkpoints import Checkpoints
from worker.export import png
from worker.history import Event, History, Notice, Picture, Stage
from worker.plan import cut_key
from worker.records import Shortened, StageResult, StopRequest
from worker.site import Site
from worker.stopping import nobody, stopped
from worker.storage import Storage

PICTURED = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the steps at which a grid is kept."""
AT_FIRST = "its first step takes 2 to 20 seconds for that, up to a minute on a busy machine"

Asked = Callable[[], StopRequest | None]
Events = Iterator[Event]


def teacher(
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    key: str,
    model: ModelSpec,
    training: TrainingSpec,
    seed: int,
    index: int,
    held_out: tuple[float, int] | None,
    asked: Asked = nobody,
) -> Stage:
    """One teacher: `weights.safetensors` with its initial and its trained end.

    Raises:
        StoppedError: `asked` gave a request.
    """
    building = Building(site, storage, "teacher", key)
    if held_out is not None:
        dataset = dataset.hold_out(held_out[0], seed=held_out[1])
    device, seconds = torch.device(site.device), site.seconds_left()
    task = TeacherTraining(dataset, model, training, seed=seed, index=index, device=device, seconds=seconds)
    checkpoints = building.checkpoints()
    if saved := checkpoints.newest():
        building.keep_threads(saved.environment)
        building.history = saved.history
        task.load_state(saved.state)
        yield Notice(f"teacher {index} goes on from {saved}")
        yield Progress(task.step, task.total, "step")
    yield Notice(f"teacher {index} is trained {f'compiled: {AT_FIRST}' if task.compiled else 'eager'}")
    told = ""
    while task.step < task.total and not asked():
        for progress in task.run(until=min(task.total, checkpoints.next_step), pause=lambda: asked() is not None):
            if task.compile_error != told:
                told = task.compile_error
                yield Notice(f"teacher {index} is trained eager after all: compiling failed ({told})")
            building.history.add(progress)
            if task.step < task.total and checkpoints.due(task.step):
                yield from checkpoints.keep(task.step, task.state(), building.history)
            yield progress
    if (request := asked()) and task.step < task.total:
        if request.checkpoint and task.step:
            yield from checkpoints.keep(task.step, task.state(), building.history)
        raise stopped()
    if task.halvings:
        yield Notice(
            f"memory ran out {task.halvings} times: teacher {index} went on in smaller pieces; the last bits are its own"
        )
    done = how_computed(compiled=task.compiled, compile_error=task.compile_error, halvings=task.halvings)
    figures: dict[str, JsonValue] = {"accuracy": task.accuracy(), "steps": task.total, **done}
    result = yield from building.commit({WEIGHTS_FILE: safetensors.torch.save(task.result())}, figures)
    yield from _cleared(checkpoints)
    return result


def distill(
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    key: str,
    teachers: Sequence[StageResult],
    model: ModelSpec,
    method: NcfmSpec,
    ipc: int,
    seed: int,
    asked: Asked = nobody,
) -> Stage:
    """The synthetic set: `images.safetensors`, with grids along the way.

    A distillation that ends early leaves a result under the key of `plan.cut_key`, and keeps its checkpoint: should it be wanted
    again, it ends at the same step.

    Raises:
        StoppedError: `asked` gave a request.
        LimitError: the wall time was over before the first step.
    """
    building, device = Building(site, storage, "distill", key), torch.device(site.device)
    yield Notice("the distillation is prepared: its teachers are read, and a compiler is tried where one would pay")
    pool = read_pool(storage, teachers, model=model, dataset=dataset, device=device)
    task = Distillation(
        dataset,
        pool,
        method,
        ipc=ipc,
        seed=seed,
        device=device,
        memory_limit=site.memory_limit_bytes,
        seconds=site.seconds_left(),
    )
    run = _Run(task, building, building.checkpoints())
    yield from run.go_on()
    first_step, started = task.step, time.monotonic()
    yield from run.advance(pause=lambda: asked() is not None or site.time_is_over())
    if (request := asked()) and task.step < task.total:
        if request.checkpoint and task.step:
            yield from run.save()
        raise stopped()
    shortened: dict[str, JsonValue] = {}
    if task.step < task.total:
        key = yield from run.cut(key)
        if (there := _found(storage, key)) is not None:
            return there
        limits = Shortened(step=task.step, steps=task.total, wall_seconds=site.wall_seconds or 0.0)
        shortened = {"shortened": limits.model_dump(mode="json")}
    seconds = max(time.monotonic() - started, 1e-9)
    rates: dict[str, JsonValue] = {
        "steps_per_second": (task.step - first_step) / seconds,
        "images_per_second": (task.step - first_step) * len(task.synthetic.labels) / seconds,
    }
    execution = asdict(task.execution)
    done = how_computed(compiled=execution.pop("compiled"), compile_error=task.compile_error, halvings=task.halvings)
    figures = {"steps": task.step, "execution": execution, **done, **_last(building.history), **rates, **shortened}
    result = yield from building.commit(run.files(), figures, key=key)
    if not shortened:
        yield from _cleared(run.checkpoints)
    return result


class _Run:
    """A distillation with what it keeps on the way: history, grids and checkpoints."""

    def __init__(self, task: Distillation, building: Building, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._task, self._building = task, building
        self._pictures: tuple[Picture, ...] = ()
        self._told = ""

    def go_on(self) -> Events:
        """From the newest checkpoint, if there is one."""
        task, building = self._task, self._building
        if saved := self.checkpoints.newest():
            building.keep_threads(saved.environment)
            building.history, self._pictures = saved.history, saved.pictures
            task.load_state(saved.state)
            yield Notice(f"the distillation goes on from {saved}")
            yield Progress(task.step, task.total, "step")
        if task.execution.compiled:
            yield Notice(f"the distillation is compiled first: {AT_FIRST} ({task.execution})")
        else:
            yield self._runs()

    def _runs(self) -> Notice:
        return Notice(f"the distillation runs {self._task.execution}")

    def advance(self, pause: Callable[[], bool]) -> Events:
        """To the last step, or the first after which `pause` says so."""
        task = self._task
        pictured = sorted({round(share * task.total) for share in PICTURED})
        is_told = not task.execution.compiled
        while True:
            if task.step in pictured:
                yield from self._picture()
            if task.step == task.total or pause():
                break
            until = min([step for step in pictured if step > task.step] + [self.checkpoints.next_step])
            for progress in task.run(until=until, pause=pause):
                if task.compile_error != self._told:
                    self._told = task.compile_error
                    yield Notice(f"the distillation runs {task.execution}: compiling failed ({self._told})")
                self._building.history.add(progress)
                if task.step < task.total and self.checkpoints.due(task.step):
                    yield from self.save()
                yield progress
                if not is_told:
                    is_told = True
                    yield self._runs()
        if task.halvings:
            yield Notice(
                f"memory ran out {task.halvings} times: it went on {task.execution}; the last bits are this run's own"
            )

    def save(self) -> Events:
        yield from self.checkpoints.keep(self._task.step, self._task.state(), self._building.history, self._pictures)

    def cut(self, key: str) -> Generator[Event, None, str]:
        """End at this step for good; the key of the result.

        Raises:
            LimitError: there was none.
        """
        task = self._task
        if not task.step:
            raise LimitError.of(
                "limits.wall_seconds", None, "over before the first step of the distillation", "Allow more."
            )
        # Before the images are brought into their range, and without the grid: what goes on from here is to end as if it had
        # never been cut.
        yield from self.save()
        task.end_here()
        yield from self._picture()
        yield Notice(f"the wall time is over: the distillation ends at step {task.step} of {task.total}")
        return cut_key(key, task.step)

    def files(self) -> dict[str, bytes]:
        """Of the result."""
        files = {picture.name: picture.png for picture in self._pictures}
        return files | {IMAGES_FILE: safetensors.torch.save(to_state(self._task.result()))}

    def _picture(self) -> Events:
        step = self._task.step
        if all(picture.step != step for picture in self._pictures):
            self._pictures += (Picture(step, png(self._task.synthetic.grid())),)
            yield self._pictures[-1]


def _cleared(checkpoints: Checkpoints) -> Events:
    """Remove them: the result is there, and does not fail for what is left beside it."""
    try:
        checkpoints.clear()
    except StorageError as error:
        yield Notice(f"checkpoints are left behind: {error}")


def _found(storage: Storage, key: str) -> StageResult | None:
    """What an earlier attempt made of the same steps."""
    try:
        return storage.find_result(key)
    except DamagedError:
        storage.set_aside(key)
        return None


def _last(history: History) -> dict[str, JsonValue]:
    """The metrics of the last row."""
    return {name: value for name, value in history.rows[-1].items() if name != "time"} if history.rows else {}
