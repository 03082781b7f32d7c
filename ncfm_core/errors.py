"""What can go wrong, as one hierarchy.

NcfmError
  SpecError        a submission is not legal
  DatasetError     a data set is missing, damaged or too small
  StorageError     a stored object cannot be read or written
    StorageFullError  there is no room for it
    DamagedError      it is missing or differs from its record
  CheckpointError  a checkpoint does not belong to this run
  ResourcesError   a device, a compiler or room that the work asks for is not there
    NoNodeError       no node of the cluster holds one task
    OutOfMemoryError  a stage does not fit the memory of its device
  TrackingError    the MLflow server cannot be used
  LimitError       the job's wall time was over too early
  StoppedError     the job was asked to stop

Every error carries `problems`: which field, with which value, what is wrong and the way out. All of them survive pickling, since
they cross process borders in Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Self

MAX_VALUE_CHARS = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, addressed to the person who can mend it."""

    field: str
    """Dotted path of the field, such as `method.steps`; empty for the document as a whole."""
    value: str
    """The offending value as text, shortened; empty where there is none."""
    message: str
    """What is wrong."""
    hint: str = ""
    """The way out."""

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        got = f" (got {self.value})" if self.value else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{where}{self.message}{got}.{hint}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def shorten(value: object) -> str:
    """The value as text of at most `MAX_VALUE_CHARS` characters, for use in a message."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


class NcfmError(Exception):
    """Base of all errors that are reported to a person."""

    code: ClassVar[str] = "error"

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def of(cls, field: str, value: object, message: str, hint: str = "") -> Self:
        """An error with one problem; `value=None` means there is no value to show."""
        return cls(Problem(field, "" if value is None else shorten(value), message, hint))

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SpecError(NcfmError):
    """A submission is not legal."""

    code = "invalid_spec"


class DatasetError(NcfmError):
    """A data set is missing, damaged or too small."""

    code = "dataset_unavailable"


class StorageError(NcfmError):
    """A stored object cannot be read or written."""

    code = "storage_error"


class StorageFullError(StorageError):
    """There is no room for an object."""

    code = "storage_full"


class DamagedError(StorageError):
    """A stored object is missing or differs from its record; its path is the first problem's field."""

    code = "storage_damaged"

    @property
    def path(self) -> str:
        """Below the storage root."""
        return self.problems[0].field


class CheckpointError(NcfmError):
    """A checkpoint does not belong to this run."""

    code = "checkpoint_mismatch"


class ResourcesError(NcfmError):
    """A device, a compiler or room that the work asks for is not there."""

    code = "resources_unavailable"


class NoNodeError(ResourcesError):
    """No node of the cluster, as it is, can ever hold one task of what the spec demands; one that joins it may."""

    code = "no_node"


class OutOfMemoryError(ResourcesError):
    """A stage does not fit the memory of its device: unlike a cluster, that will not have more of it later."""

    code = "out_of_memory"


class TrackingError(NcfmError):
    """The MLflow server cannot be used."""

    code = "tracking_unavailable"


class LimitError(NcfmError):
    """The job's wall time was over before there was anything to show."""

    code = "limit_reached"


class StoppedError(NcfmError):
    """The job was asked to stop."""

    code = "stopped"
