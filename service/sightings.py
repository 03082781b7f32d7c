"""What the controller last saw of the cluster, as the database keeps it for the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from pydantic import JsonValue
from sqlalchemy import select, update

from service.database import Database, insert_missing
from service.tables import cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the controller last saw: how the API knows where a job would run without asking anybody."""

    cpus: float | None = None
    """Totals of the cluster; None before it was first seen."""
    gpus: float | None = None
    """Likewise; those that went away count until they have been away for some minutes."""
    seen_at: datetime | None = None
    """When Ray last answered."""
    checked_at: datetime
    """When the controller last looked."""
    ray_error: str = ""
    mlflow_error: str = ""
    nodes: Sequence[Mapping[str, JsonValue]] = ()
    """Of the cluster, as Ray last listed them."""


class Sightings(Database):
    """The database's one row about the cluster."""

    def see(self, sighting: Sighting) -> None:
        """Replace what is known of the cluster; totals that are None leave the last ones standing."""
        with self.writing() as connection:
            row = connection.execute(select(cluster).with_for_update()).one_or_none()
            if sighting.cpus is None and row is not None:
                sighting = replace(sighting, cpus=row.cpus, gpus=row.gpus, seen_at=row.seen_at, nodes=tuple(row.nodes))
            values = asdict(sighting) | {"nodes": [dict(node) for node in sighting.nodes]}
            if row is None:
                insert_missing(connection, cluster, id=1, **values)
            else:
                connection.execute(update(cluster).values(values))

    def sighting(self) -> Sighting | None:
        with self.reading() as connection:
            row = connection.execute(select(cluster)).one_or_none()
        if row is None:
            return None
        fields = row._asdict()
        del fields["id"]
        return Sighting(**fields | {"nodes": tuple(fields["nodes"])})

    def check_writable(self) -> None:
        """Prove that a write would be taken, leaving nothing behind."""
        with self.trying() as connection:
            connection.execute(update(cluster).values(id=cluster.c.id))
