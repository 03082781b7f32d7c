"""What stages are told of their surroundings: where and for whom a result is computed, and on what data. Light."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pydantic import JsonValue

from ncfm_core.catalog import DatasetFacts
from ncfm_core.spec import CheckpointSpec
from worker.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a result is computed and for whom: recorded with it, never part of its key."""

    job_id: str
    attempt: int
    storage_url: str
    device: str
    threads: int
    memory_limit: int | None = None
    """MiB for the activations of a distillation step; None for what is fast on the device."""
    checkpoint: CheckpointSpec
    code_version: str
    wall_seconds: float | None = None
    """The job's limit; None for none."""
    deadline: float | None = None
    """When it is over, in seconds since 1970."""

    @property
    def memory_limit_bytes(self) -> int | None:
        return None if self.memory_limit is None else self.memory_limit << 20

    @property
    def conditions(self) -> dict[str, JsonValue]:
        """What a checkpoint carries on, and another job's may not (`worker.resuming`)."""
        return {"device": self.device, "threads": self.threads, "memory_limit": self.memory_limit}

    def time_is_over(self) -> bool:
        """Whether the distillation has to end where it is."""
        return self.deadline is not None and time.time() >= self.deadline

    def seconds_left(self) -> float | None:
        """Until the distillation has to end; None for no limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.time())

    @property
    def built_by(self) -> str:
        return f"{self.job_id}-{self.attempt}"


class DataFacts(Record):
    """What the inspection found."""

    digest: str
    held_out_digest: str | None
    class_counts: tuple[int, ...]
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    split: str = "published"
    """How training and test images were told apart."""
    ignored_files: int = 0
    """Files that are not images, or lie outside the class folders."""

    def refine(self, facts: DatasetFacts) -> DatasetFacts:
        """What a spec says of the data, with the counts that were found."""
        return replace(
            facts,
            num_classes=len(self.class_counts),
            num_train=self.num_train,
            num_test=self.num_test,
            smallest_class=min(self.class_counts),
            assumed=False,
        )
