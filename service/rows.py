"""Jobs as rows of the database, and back."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row

from ncfm_core.errors import NcfmError, shorten
from service.jobs import Job
from service.tables import UtcDateTime, jobs


class UnreadableJob(NcfmError):
    """The row of a job is damaged, or of a later release."""

    code = "job_unreadable"


WAY_OUT = (
    "Was it kept by a later release? Use that one. `ncfm doctor` lists all such rows; a backup may have this one whole."
)


def as_row(job: Job) -> dict[str, Any]:
    """A job as column values: JSON columns get plain JSON, times stay times."""
    # PostgreSQL keeps no NUL, and neither engine half a surrogate pair: what a driver says may hold either.
    message = job.message.encode(errors="replace").decode().replace("\0", "?")
    plain = job.model_dump(mode="json", exclude={"message"}) | {"message": message}
    derived = {name: getattr(job, name) for name in ("rank", "dataset", "method", "spec_digest")}
    return {
        column.name: derived[column.name]
        if column.name in derived
        else getattr(job, column.name)
        if isinstance(column.type, UtcDateTime)
        else plain[column.name]
        for column in jobs.columns
    }


def job_of(row: Row[Any]) -> Job:
    """The job of a row.

    Raises:
        UnreadableJob: the row is damaged, or has what only a later release knows.
    """
    fields = row._asdict()
    # They were checked when they came, and are two thirds of the work.
    plain = {name: fields.pop(name) for name in ("requested", "spec")}
    try:
        return Job.model_validate(fields | {name: {} for name in plain}).model_copy(update=plain)
    except ValidationError as error:
        raise UnreadableJob.of("job", row.id, f"its row cannot be read: {what_is_wrong(error)}", WAY_OUT) from error


def workable_job_of(row: Row[Any]) -> Job:
    """The job of a row, of which is also known what it takes of the cluster.

    Raises:
        UnreadableJob: as `job_of`, or its spec does not say that.
    """
    job = job_of(row)
    try:
        _ = job.demand
    except (ValueError, TypeError, KeyError) as error:
        message = "its row cannot be read: spec.resources is not what this release knows"
        raise UnreadableJob.of("job", row.id, message, WAY_OUT) from error
    return job


def what_is_wrong(error: ValidationError) -> str:
    """The first fault of a row, in a line."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])} is {shorten(first['input'])}"
