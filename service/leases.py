"""Leases: who may act for all, told by a row of the database, its clock, and a token that grows with each new holder.

The holder's writes carry its token (`check_fence`): a process that was stopped, or cut off, and wakes up after another one took
over can neither write nor renew.
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


def acquire(database: Database, holder: str, *, seconds: float, name: str = CONTROLLER_LEASE) -> Lease:
    """Take the lease, or renew it, where it is free, over, or ours; otherwise see who has it.

    Args:
        database: that holds it.
        holder: a name that no other process ever has.
        seconds: how long it holds unless renewed.
        name: which lease.

    Returns:
        The lease as it now is: ours if its holder is we.
    """
    with Database.writing(database) as connection:
        insert_missing(connection, leases, name=name, holder="", token=0, expires_at=0.0)
        row = connection.execute(select(leases).where(leases.c.name == name).with_for_update()).one()
        # Once the row is ours to change: waiting for it takes time.
        at = clock(connection)
        if row.holder != holder and row.expires_at > at:
            return Lease(row.holder, row.token, row.expires_at - at)
        token = row.token if row.holder == holder else row.token + 1
        values = {"holder": holder, "token": token, "expires_at": at + seconds}
        connection.execute(update(leases).where(leases.c.name == name).values(values))
        return Lease(holder, token, seconds)


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
