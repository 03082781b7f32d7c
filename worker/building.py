"""What all stages share: where they run, how a result is built and committed, and how results are read back."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import safetensors.torch
import torch
from pydantic import JsonValue

from ncfm_core.datasets import Dataset
from ncfm_core.pools import TeacherPool
from ncfm_core.spec import ModelSpec
from ncfm_core.synthetic import SyntheticSet, from_state
from worker.checkpoints import Checkpoints
from worker.environment import describe, peak_memory
from worker.history import HISTORY_FILE, History, Trouble
from worker.patience import when_there_is_room
from worker.plan import STAGE_OF, Kind
from worker.records import StageResult, now, object_folder
from worker.site import Site
from worker.storage import Storage

WEIGHTS_FILE = "weights.safetensors"
IMAGES_FILE = "images.safetensors"


class Building:
    """A result in the making: its clock, its history and its commit."""

    def __init__(self, site: Site, storage: Storage, kind: Kind, key: str) -> None:
        self.history = History()
        self._site, self._storage, self._kind, self._key = site, storage, kind, key
        self._started = time.monotonic()
        torch.set_num_threads(site.threads)
        if site.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        self.environment = describe(site.device, site.threads, site.code_version) | site.conditions

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self._storage,
            job_id=self._site.job_id,
            attempt=self._site.attempt,
            key=self._key,
            every=self._site.checkpoint,
            environment=self.environment,
        )

    def keep_threads(self, recorded: dict[str, JsonValue]) -> None:
        """Go on with the threads of the checkpoint: another number of them may round sums differently."""
        threads = recorded.get("threads")
        if isinstance(threads, int):
            torch.set_num_threads(threads)
            self.environment["threads"] = threads

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def commit(
        self, files: dict[str, bytes], figures: dict[str, JsonValue], *, key: str = ""
    ) -> Generator[Trouble, None, StageResult]:
        """Store the files and make them the result of the key; a full storage is waited for.

        Args:
            files: by name; the history is added.
            figures: what was found.
            key: of the result, where it is another than that of what was to be built.
        """
        key, stage = key or self._key, STAGE_OF[self._kind]
        if self.history.rows:
            files = files | {HISTORY_FILE: self.history.encode()}
        figures = figures | {"peak_memory_bytes": peak_memory(self._site.device)}
        seconds = round(self.seconds(), 3)
        folder = object_folder(self._site.built_by, stage, key)

        def write() -> StageResult:
            result = StageResult(
                key=key,
                stage=stage,
                built_by=self._site.built_by,
                created_at=now(),
                files=self._storage.write_files(folder, files),
                figures=figures,
                seconds=seconds,
                environment=self.environment,
            )
            return self._storage.commit(result)

        return (yield from when_there_is_room(write, f"the result of {stage}"))


def how_computed(*, compiled: bool, compile_error: str, halvings: int) -> dict[str, JsonValue]:
    """How networks went through their steps, for the figures: no part of a key, as it moves the last bits at most.

    Args:
        compiled: whether through `torch.compile`.
        compile_error: why not although they were to; empty where that is not so.
        halvings: how often memory ran out, so that pieces were halved.
    """
    error: dict[str, JsonValue] = {"compile_error": compile_error} if compile_error else {}
    return {"compiled": compiled, "halvings": halvings, **error}


def read_result_file(storage: Storage, result: StageResult, name: str) -> bytes:
    """A file of a result by its name, verified."""
    return storage.read_file(next(file for file in result.files if file.name == name))


def read_synthetic(storage: Storage, result: StageResult) -> SyntheticSet:
    """The set that a distillation made."""
    return from_state(safetensors.torch.load(read_result_file(storage, result, IMAGES_FILE)))


def read_pool(
    storage: Storage, teachers: Sequence[StageResult], *, model: ModelSpec, dataset: Dataset, device: torch.device
) -> TeacherPool:
    """The pool of stored teachers."""
    weights = [safetensors.torch.load(read_result_file(storage, teacher, WEIGHTS_FILE)) for teacher in teachers]
    return TeacherPool(model, dataset, weights, device)
