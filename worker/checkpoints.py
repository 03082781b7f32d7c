"""Checkpoints of a running stage: one safetensors file, then its record as the commit.

The file carries the state, the history and the pictures so far, so that a resumed stage ends with the very result of one
that was never disturbed. A checkpoint belongs to the attempt that wrote it; later attempts, and other jobs that need the very
same result, only read it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import safetensors.torch
import torch
from pydantic import JsonValue

from ncfm_core.errors import CheckpointError, StorageError, StorageFullError
from ncfm_core.spec import CheckpointSpec
from worker.history import History, Kept, Picture, Trouble, read_history
from worker.patience import TOPIC
from worker.records import CheckpointRecord, FileRecord, checkpoint_folder, resumable_path
from worker.resuming import checkpoint_paths, left_by_others
from worker.storage import Storage

KEPT = 2
_STATE, _PICTURE = "state.", "picture."


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint, read and verified."""

    step: int
    state: dict[str, torch.Tensor]
    history: History
    pictures: tuple[Picture, ...]
    environment: dict[str, JsonValue]
    job_id: str | None = None
    """The other job whose it is; None for this job's own."""

    def __str__(self) -> str:
        return f"step {self.step}" + (f" of job {self.job_id}" if self.job_id else "")


class Checkpoints:
    """The checkpoints of one result in one attempt."""

    def __init__(
        self,
        storage: Storage,
        *,
        job_id: str,
        attempt: int,
        key: str,
        every: CheckpointSpec,
        environment: dict[str, JsonValue],
    ) -> None:
        self.environment = environment
        self._storage = storage
        self._job_id = job_id
        self._key = key
        self._every = every
        self._own = checkpoint_folder(job_id, key, attempt)
        self._step = self._furthest = 0
        self._saved_at = time.monotonic()
        self._in_trouble = self._is_marked = False

    @property
    def next_step(self) -> int:
        """Where the next one is due at the latest: a multiple, so that reports fall on the same steps in every run."""
        return (self._step // self._every.every_steps + 1) * self._every.every_steps

    def due(self, step: int) -> bool:
        """Whether the stage should save itself at this step."""
        return step > self._step and (
            step >= self.next_step or time.monotonic() - self._saved_at >= self._every.every_seconds
        )

    def newest(self) -> Saved | None:
        """The newest checkpoint of any attempt that is whole; a damaged one is passed over for the one before it.

        Where this job has none, that of any other job under the same key that was made in the same way (`left_by_others`).
        """
        own = checkpoint_paths(self._storage, self._key, [self._job_id])
        # A damaged one counts too: whoever comes this far a second time has only caught up.
        self._furthest = max((step for step, *_ in own), default=0)
        saved = self._own_newest(own) or self._newest_of_others()
        if saved is not None:
            self._step, self._saved_at = saved.step, time.monotonic()
            self._furthest = max(self._furthest, saved.step)
        return saved

    def _own_newest(self, paths: list[tuple[int, str, str]]) -> Saved | None:
        for _, path, _ in paths:
            with suppress(StorageError):
                record = self._storage.get_record(path, CheckpointRecord)
                if record is not None and record.key == self._key and (saved := self._read(record)) is not None:
                    return saved
        return None

    def _newest_of_others(self) -> Saved | None:
        others = left_by_others(self._storage, self._key, job_id=self._job_id, environment=self.environment)
        for job_id, record in others:
            if (saved := self._read(record)) is not None:
                return replace(saved, job_id=job_id)
        return None

    def _read(self, record: CheckpointRecord) -> Saved | None:
        """A checkpoint; None for one that is not whole."""
        try:
            return _decode(record, self._storage.read_file(record.file))
        except (StorageError, CheckpointError):
            return None

    def keep(
        self, step: int, state: dict[str, torch.Tensor], history: History, pictures: tuple[Picture, ...] = ()
    ) -> Iterator[Trouble | Kept]:
        """Save; one that cannot be written is passed over until the next is due, and the computation goes on.

        Yields:
            That it could not, and once that it could again; and each that is further than all before it, in any attempt.
        """
        try:
            self.save(step, state, history, pictures)
        except StorageError as error:
            self._step, self._saved_at, self._in_trouble = step, time.monotonic(), True
            what = "storage is full" if isinstance(error, StorageFullError) else "storage cannot be written"
            yield Trouble(TOPIC, f"{what}: the checkpoint at step {step} is left out")
        else:
            if self._in_trouble:
                self._in_trouble = False
                yield Trouble(TOPIC, "")
            if step > self._furthest:
                self._furthest = step
                yield Kept(step)

    def save(
        self, step: int, state: dict[str, torch.Tensor], history: History, pictures: tuple[Picture, ...] = ()
    ) -> None:
        """Write and commit a checkpoint, then drop all but the newest two of this attempt."""
        data = _encode(state, history, pictures)
        path = f"{self._own}/{step:010d}.safetensors"
        self._storage.put(path, data)
        file = FileRecord(
            name=PurePosixPath(path).name, path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        record = CheckpointRecord(key=self._key, step=step, file=file, environment=self.environment)
        try:
            self._storage.put_record(f"{self._own}/{step:010d}.json", record)
        except StorageError:
            with suppress(StorageError):
                self._storage.delete([path])  # without its record it only takes room
            raise
        self._step, self._saved_at = step, time.monotonic()
        self._mark()
        self._drop(KEPT)

    def clear(self) -> None:
        """Drop those of this attempt, once its result is committed: from then on nobody looks for one."""
        self._drop(0)
        self._storage.delete([resumable_path(self._key, self._job_id)])

    def _mark(self) -> None:
        """Let other jobs find them; without a mark they are still this job's own to go on from."""
        if not self._is_marked:
            with suppress(StorageError):
                self._storage.put(resumable_path(self._key, self._job_id), b"\n")
                self._is_marked = True

    def _drop(self, kept: int) -> None:
        steps = sorted({PurePosixPath(path).stem for path in self._storage.list(self._own)})
        for step in steps[: len(steps) - kept]:
            # The record first: a checkpoint without one does not exist for a reader.
            self._storage.delete([f"{self._own}/{step}.json", f"{self._own}/{step}.safetensors"])


def _encode(state: dict[str, torch.Tensor], history: History, pictures: tuple[Picture, ...]) -> bytes:
    tensors = {_STATE + name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    for picture in pictures:
        tensors[f"{_PICTURE}{picture.step}"] = torch.frombuffer(bytearray(picture.png), dtype=torch.uint8)
    return safetensors.torch.save(tensors, metadata={"history": history.encode().decode()})


def _decode(record: CheckpointRecord, data: bytes) -> Saved:
    tensors = safetensors.torch.load(data)
    pictures = sorted(int(name.removeprefix(_PICTURE)) for name in tensors if name.startswith(_PICTURE))
    return Saved(
        step=record.step,
        state={name.removeprefix(_STATE): each for name, each in tensors.items() if name.startswith(_STATE)},
        history=read_history(read_metadata(data).get("history", "").encode()),
        pictures=tuple(Picture(step, tensors[f"{_PICTURE}{step}"].numpy().tobytes()) for step in pictures),
        environment=record.environment,
    )


def read_metadata(data: bytes) -> dict[str, str]:
    """The text entries in the header of a safetensors file, which its own loader drops for bytes in memory."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata
