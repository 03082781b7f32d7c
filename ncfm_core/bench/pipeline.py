"""`bench pipeline`: teachers, distillation and students of one spec, timed, in one go or cut into calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ncfm_core.bench.compiling import choose_compiled
from ncfm_core.bench.folder import Folder
from ncfm_core.bench.keeping import Keeping, choose_keeping, content_of, restored
from ncfm_core.bench.machine import synchronise
from ncfm_core.bench.work import Work
from ncfm_core.distill import Distillation
from ncfm_core.errors import CheckpointError, SpecError
from ncfm_core.evaluate import evaluate
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.progress import Progress, finish
from ncfm_core.protocols import Document
from ncfm_core.spec import digest
from ncfm_core.synthetic import from_state, to_state
from ncfm_core.training import part

STRIDE_SECONDS = 0.5
"""Time between two looks at the clock, about; each costs one wait for the device."""
GOING, TEACHERS, SETS = "going", "teachers", "sets"
"""Groups of the folder: what is under way, the trained ends of finished teachers, finished sets."""


class Clock(Protocol):
    """Says when a call has to come to its end."""

    def allows(self, expected: float | None = 0.0) -> bool:
        """Whether work of so many seconds may begin now; None for work that nobody has timed yet."""
        ...


class Deadline:
    """So many seconds after a start; never for None. Untimed work may begin in the first half."""

    def __init__(self, seconds: float | None, *, started: float) -> None:
        self._seconds, self._started = seconds, started

    def allows(self, expected: float | None = 0.0) -> bool:
        if self._seconds is None:
            return True
        return time.monotonic() - self._started + (self._seconds / 2 if expected is None else expected) < self._seconds


class Resumable(Protocol):
    """A teacher's training, or a distillation."""

    @property
    def step(self) -> int: ...

    @property
    def total(self) -> int: ...

    def run(self, until: int | None = None) -> Iterator[Progress]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(slots=True, kw_only=True)
class State:
    """How far a run is, but for its tensors; all plain JSON values."""

    identity: dict[str, Any]
    seeds: list[int] = field(default_factory=list)
    threads: int = 0
    calls: int = 0
    exact: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("teachers", "distill", "evaluate"), 0.0))
    teacher_accuracy: list[float] = field(default_factory=list)
    students: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    """By seed, for each entry of `evaluate`: `last` and `best`, one accuracy a student."""
    longest: dict[str, float] = field(default_factory=dict)
    """By entry: seconds of the longest group of students."""
    fallen_back: list[str] = field(default_factory=list)
    """What the compiler failed, so that it is eager from then on: `teachers`, or the index of an entry of `evaluate`."""
    going: dict[str, Any] | None = None
    """What was under way when a call ended."""


class Pipeline:
    """From data to accuracy, for several seeds that share their teachers."""

    def __init__(
        self,
        work: Work,
        *,
        seeds: Sequence[int],
        clock: Clock,
        say: Callable[[str], None],
        group: int | None = None,
        folder: Folder | None = None,
        folder_bytes: int = 0,
    ) -> None:
        """
        Args:
            work: what is measured.
            seeds: one synthetic set for each.
            clock: ends the call.
            say: takes a line about every part that is done.
            group: students trained between two looks at the clock; None for one with a folder, else all.
            folder: to go on from and to save in; None to run in one go.
            folder_bytes: most bytes in it.

        Raises:
            CheckpointError: the folder is of another run.
            ResourcesError: the run does not fit the folder.
            SpecError: an evaluation chooses its rate.
        """
        for index, entry in enumerate(work.spec.evaluate):
            if entry.lr_grid:
                field = f"evaluate.{index}.lr_grid"
                raise SpecError.of(
                    field, entry.lr_grid, "a pipeline chooses no rates", "Leave it empty and set training.lr."
                )
        self._work, self._seeds, self._clock, self._say = work, tuple(seeds), clock, say
        self._dataset = work.dataset.to(work.device)
        self._group, self._folder = group or (1 if folder else None), folder
        self._state = self._begin()
        self.keeping = choose_keeping(content_of(work, len(self._seeds)), folder_bytes) if folder else Keeping()
        self._state.exact &= self.keeping.is_exact
        self._trained = _unnested(folder.load(TEACHERS)) if folder else {}
        self._sets = _unnested(folder.load(SETS)) if folder else {}
        self._pool: TeacherPool | None = None
        self._compiled = choose_compiled(work, self._dataset, len(self._seeds))
        for name in self._state.fallen_back:
            self._compiled = self._compiled.without(name)
        self._teachers_compiled = False
        self._moved = False
        self._mark = time.perf_counter()

    def _begin(self) -> State:
        spec = self._work.spec
        parts = spec.model_dump(mode="json", include={"dataset", "ipc", "method", "model", "teachers", "evaluate"})
        identity = {"spec": digest(parts), "data": self._dataset.digest, "device": self._work.device.type}
        identity["group"] = str(self._group)
        state = State(identity=identity)
        if self._folder and self._folder.record is not None:
            # Plain JSON that this class wrote; whether it belongs to this run is the next question.
            state = State(**self._folder.record)  # type: ignore[arg-type]
            if state.identity != identity or list(self._seeds[: len(state.seeds)]) != state.seeds:
                differs = [name for name, value in identity.items() if state.identity.get(name) != value] or ["seeds"]
                raise CheckpointError.of(
                    "--folder",
                    str(self._folder.path),
                    f"holds a run that differs in {', '.join(differs)}",
                    f"Call with what it was begun with (its seeds first: {state.seeds}), or name an empty folder.",
                )
            if self._work.threads is None:
                torch.set_num_threads(state.threads)
        state.seeds, state.threads = list(self._seeds), torch.get_num_threads()
        state.calls += 1
        return state

    def run(self) -> bool:
        """Go on to the end, or until the clock ends the call; whether all is done."""
        done = self._teach() and all(self._distil(seed) and self._judge(seed) for seed in self._seeds)
        if done:
            self._state.going = None
        self._save({})
        return done

    def _teach(self) -> bool:
        count = self._work.spec.teachers.count
        while len(self._trained) < count:
            index = len(self._trained)
            training = self._teacher(index)
            # The first teacher that is compiled takes its time before the first step, and the next ones find the code there.
            if not self._may_begin(None if training.compiled and not self._teachers_compiled else 0.0):
                return self._stopped("teachers", index=index)
            is_done = self._advance(training, "teachers", index=index)
            if training.compile_error:
                self._fall_back("teachers")
            if not is_done:
                return False
            self._teachers_compiled |= training.compiled
            self._trained[str(index)] = self.keeping.keep_teacher(part(training.result(), "trained."))
            self._state.teacher_accuracy.append(training.accuracy())
            self._finish("teachers", f"teacher {index + 1}/{count}", {TEACHERS: _nested(self._trained)})
        return True

    def _distil(self, seed: int) -> bool:
        if str(seed) in self._sets:
            return True
        # Compiling takes its time before the first step.
        if not self._may_begin(None):
            return self._stopped("distill", seed=seed)
        spec, device = self._work.spec, self._work.device
        self._pool = self._pool or self._build_pool()
        run = Distillation(
            self._dataset,
            self._pool,
            spec.method,
            ipc=spec.ipc,
            seed=seed,
            device=device,
            memory_limit=self._work.memory_limit,
            compiled=self._work.compiled,
        )
        if not self._advance(run, "distill", seed=seed):
            return False
        self._sets[str(seed)] = self.keeping.keep_set(to_state(run.result()))
        self._finish("distill", f"set of seed {seed}", {SETS: _nested(self._sets)})
        return True

    def _judge(self, seed: int) -> bool:
        entries = self._work.spec.evaluate
        judged = self._state.students.setdefault(str(seed), [{"last": [], "best": []} for _ in entries])
        synthetic = from_state(restored(self._sets[str(seed)]))
        images, labels = synthetic.decode()
        for number, (entry, found) in enumerate(zip(entries, judged, strict=True)):
            while (first := len(found["last"])) < entry.students:
                if not self._may_begin(self._state.longest.get(str(number))):
                    return self._stopped("evaluate", seed=seed, entry=number, index=first)
                started = time.perf_counter()
                steps = evaluate(
                    images,
                    labels,
                    self._dataset,
                    model=entry.model,
                    training=entry.training,
                    students=min(self._group or entry.students, entry.students - first),
                    tests=entry.tests,
                    seed=seed,
                    device=self._work.device,
                    first=first,
                    compiled=self._compiled.students[number],
                    may_fall_back=self._work.compiled is None,
                    targets=synthetic.soft_labels if entry.training.needs_soft_labels else None,
                )
                students = finish(steps)
                found["last"] += students.last
                found["best"] += students.best
                if students.compile_error:
                    self._fall_back(str(number))
                took = time.perf_counter() - started
                self._state.longest[str(number)] = max(took, self._state.longest.get(str(number), 0.0))
                self._finish("evaluate", f"student {len(found['last'])}/{entry.students} of seed {seed}", {})
        return True

    def _teacher(self, index: int) -> TeacherTraining:
        spec = self._work.spec
        return TeacherTraining(
            self._dataset,
            spec.model,
            spec.teachers.training,
            seed=spec.teachers.seed,
            index=index,
            device=self._work.device,
            compiled=self._compiled.teachers,
            may_fall_back=self._work.compiled is None,
        )

    def _fall_back(self, name: str) -> None:
        """No more of them is compiled, in this call or a later one."""
        self._state.fallen_back.append(name)
        self._compiled = self._compiled.without(name)

    def _build_pool(self) -> TeacherPool:
        """From the trained ends as they are kept, and the initial ones, which are drawn again."""
        both = [
            {name: tensor for name, tensor in self._teacher(index).result().items() if name.startswith("initial.")}
            | {f"trained.{name}": tensor for name, tensor in restored(self._trained[str(index)]).items()}
            for index in range(self._work.spec.teachers.count)
        ]
        return TeacherPool(self._work.spec.model, self._dataset, both, self._work.device)

    def _may_begin(self, expected: float | None = 0.0) -> bool:
        """Whether to begin the next thing: every call does at least something."""
        return not self._moved or self._clock.allows(expected)

    def _advance(self, run: Resumable, name: str, **which: int) -> bool:
        """Run to the end, from where an earlier call left it; False if the clock came first, and all is saved."""
        going = self._state.going
        if self._folder and going and going["part"] == name and "step" in going:
            run.load_state(restored(self._folder.load(GOING)))
            self._state.going = None
        stride = 1
        while run.step < run.total:
            started = time.perf_counter()
            for _ in run.run(until=min(run.total, run.step + stride)):
                pass
            took, self._moved = time.perf_counter() - started, True
            if run.step < run.total and not self._clock.allows():
                state = run.state()
                kept = self.keeping.keep_distillation(state) if name == "distill" else state
                self._charge(name)
                self._state.going = {"part": name, **which, "step": run.step, "total": run.total}
                self._save({GOING: kept})
                return False
            stride = max(
                1, 2 * stride if took < STRIDE_SECONDS else stride // 2 if took > 2 * STRIDE_SECONDS else stride
            )
        return True

    def _stopped(self, name: str, **which: int) -> bool:
        """Note that nothing is under way, and what comes next."""
        self._state.going = {"part": name, **which}
        return False

    def _charge(self, name: str) -> None:
        """Put the time since the last mark down to a part."""
        synchronise(self._work.device)
        now = time.perf_counter()
        self._state.seconds[name] += now - self._mark
        self._mark = now

    def _finish(self, name: str, what: str, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._charge(name)
        self._moved, self._state.going = True, None
        self._save({**groups, GOING: {}})
        self._say(f"{what} ({self._state.seconds[name]:.1f} s of {name} so far)")

    def _save(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._folder:
            self._folder.save(asdict(self._state), groups)
            # Saving is no part of the work.
            self._mark = time.perf_counter()

    def document(self) -> Document:
        """The line of output."""
        state = self._state
        seconds = {name: round(value, 2) for name, value in state.seconds.items()}
        document: Document = self._work.describe() | {
            "bench": "pipeline",
            "done": state.going is None,
            "seeds": list(self._seeds),
            "seconds": {**seconds, "total": round(sum(state.seconds.values()), 2)},
            "calls": state.calls,
            "teacher_accuracy": _mean(state.teacher_accuracy),
            "accuracy": self._accuracy(0),
            "evaluations": [self._accuracy(number) for number in range(len(self._work.spec.evaluate))],
            "compiled": self._compiled.as_dict(),
            "exact": state.exact,
            "moments": self.keeping.moments != "none",
        }
        if state.going is not None:
            document["stopped"] = state.going
        if self._folder:
            sizes = self._folder.sizes()
            document["stored"] = dict(self.keeping.as_dict())
            document["folder"] = {
                "files": len(sizes),
                "largest_mib": round(max(sizes.values()) / 2**20, 2),
                "mib": round(sum(sizes.values()) / 2**20, 2),
            }
        return document

    def _accuracy(self, number: int) -> Document:
        """Over the students of all seeds so far, last epoch; best apart."""
        entry = self._work.spec.evaluate[number]
        judged = [self._state.students[str(seed)][number] for seed in self._seeds if str(seed) in self._state.students]
        last, best = ([value for one in judged for value in one[end]] for end in ("last", "best"))
        mean = sum(last) / len(last) if last else 0.0
        std = math.sqrt(sum((value - mean) ** 2 for value in last) / (len(last) - 1)) if len(last) > 1 else None
        return {
            "protocol": entry.protocol,
            "model": entry.model.name,
            "mean": _mean(last),
            "std": None if std is None else round(std, 3),
            "n": len(last),
            "best_mean": _mean(best),
            "by_seed": {str(seed): list(one["last"]) for seed, one in zip(self._seeds, judged, strict=False)},
        }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _nested(by_name: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{outer}.{name}": tensor for outer, tensors in by_name.items() for name, tensor in tensors.items()}


def _unnested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        outer, inner = name.split(".", 1)
        by_name.setdefault(outer, {})[inner] = tensor
    return by_name
