"""Leases: who may act for all, told by a row of the database, its clock, and a token that grows with each new holder.

The holder's writes carry its token (`check_fence`): a process that was stopped, or cut off, and wakes up after another one took
over can neither write nor renew.

Only the database's clock is compared with itself, so clocks of other hosts may be wrong by any amount. It may be set, though:
after a jump back a lease that nobody renews would hold for as long as the jump. One that ends later than its whole length from
now, and has not been renewed for that long by the asker's own steady clock, is over. That assumes that all who ask for a lease
give it about the same length (`NCFM_LEASE_SECONDS`): a holder renews after a third of it. After a jump forward a live holder may
lose its lease, and the fence keeps it from writing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from ncfm_core.errors import NcfmError
from service.database import Database, clock, insert_missing
from service.tables import leases

CONTROLLER_LEASE = "controller"


class FencedError(NcfmError):
    """Another process holds the lease now: nothing that this one decided is applied."""

    code = "fenced"


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as a process sees it."""

    holder: str
    token: int
    """The holder's fence: grows with each new holder."""
    seconds_left: float
    """By the database's clock; negative once it may be taken."""
    expires_at: float
    """The same as a time of that clock: changes with each renewal."""


def acquire(
    database: Database, holder: str, *, seconds: float, name: str = CONTROLLER_LEASE, unrenewed: float | None = None
) -> Lease:
    """Take the lease, or renew it, where it is free, over, or ours; otherwise see who has it.

    Args:
        database: that holds it.
        holder: a name that no other process ever has.
        seconds: how long it holds unless renewed.
        name: which lease.
        unrenewed: the `expires_at` that the lease of another has had for `seconds` or longer by our own steady clock.

    Returns:
        The lease as it now is: ours if its holder is we.
    """
    with Database.writing(database) as connection:
        insert_missing(connection, leases, name=name, holder="", token=0, expires_at=0.0)
        row = connection.execute(select(leases).where(leases.c.name == name).with_for_update()).one()
        # Once the row is ours to change: waiting for it takes time.
        at = clock(connection)
        left = row.expires_at - at
        # It cannot have been set to that by the clock as it is now, and its holder is not there to set it right.
        is_stale = left > seconds and row.expires_at == unrenewed
        if row.holder != holder and left > 0 and not is_stale:
            return Lease(row.holder, row.token, left, row.expires_at)
        token = row.token if row.holder == holder else row.token + 1
        values = {"holder": holder, "token": token, "expires_at": at + seconds}
        connection.execute(update(leases).where(leases.c.name == name).values(values))
        return Lease(holder, token, seconds, at + seconds)


def release(database: Database, holder: str, *, name: str = CONTROLLER_LEASE) -> None:
    """Let another process take the lease at once; nothing where it is not ours."""
    with Database.writing(database) as connection:
        ours = (leases.c.name == name, leases.c.holder == holder)
        connection.execute(update(leases).where(*ours).values(expires_at=0.0))


def check_fence(connection: Connection, token: int | None, *, name: str = CONTROLLER_LEASE) -> None:
    """Refuse to go on in a transaction whose process has lost the lease; nobody can take it before the transaction ends.

    Raises:
        FencedError: another process holds it.
    """
    # PostgreSQL keeps the row from changing; SQLite has one writer anyway.
    row = connection.execute(select(leases).where(leases.c.name == name).with_for_update(read=True)).one_or_none()
    if row is None or row.token != token:
        current = "nobody" if row is None else row.holder
        raise FencedError.of("lease", str(token), f"another controller took over ({current})", "This one stands by.")
