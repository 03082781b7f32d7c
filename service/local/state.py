"""What a home remembers of its stack: the lock of the one that runs, and where to find it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from ncfm_core.errors import NcfmError
from service.processes import PROCESSES, ProcessName


class StackError(NcfmError):
    """The embedded stack cannot be started, or does not run."""

    code = "stack_error"


class StackState(BaseModel):
    """`stack.json`: written by the supervisor, read by everybody else."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    state: Literal["starting", "up", "down"]
    """`up` while all four answer; `starting` also while one of them is being restarted."""
    stack_id: str
    """In the environment of every process of the stack."""
    home: str
    supervisor: int
    """Process id of `ncfm up`."""
    api: str
    mlflow: str
    ray: str
    ports: dict[str, int]
    processes: dict[ProcessName, int | None]
    ray_tmpdir: str
    ray_token_path: str


class StackStatus(BaseModel):
    """What `ncfm status --json` prints."""

    model_config = ConfigDict(frozen=True)

    state: Literal["up", "starting", "down"]
    api: str | None
    mlflow: str | None
    ray: str | None
    processes: dict[ProcessName, int | None]


class Home:
    """The folder of a stack's state (NCFM_HOME)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self._state = folder / "stack.json"
        self._lock = folder / "stack.lock"

    def create(self) -> None:
        """Make the folder and those in it that are always there.

        Raises:
            StackError: it cannot be written.
        """
        try:
            for folder in (self.folder, self.logs, self.folder / "mlflow"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StackError.of(
                "NCFM_HOME",
                str(self.folder),
                f"the folder cannot be written: {error.strerror}",
                "Set NCFM_HOME to a folder of yours.",
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home for this process; the system lets go of it when the process dies.

        Raises:
            StackError: another stack runs here.
        """
        with self._lock.open("a") as file:
            # Somebody who asks for the status holds it for an instant.
            if not any(_lock(file, fcntl.LOCK_EX, pause_s=pause_s) for pause_s in (0, 0.1, 0.2)):
                other = self.read()
                who = f" (process {other.supervisor}, {other.api})" if other else ""
                raise StackError.of(
                    "NCFM_HOME",
                    str(self.folder),
                    f"a stack already runs here{who}",
                    "Use it, stop it, or set NCFM_HOME to another folder.",
                )
            yield

    def is_locked(self) -> bool:
        """Whether a stack runs here."""
        try:
            with self._lock.open("r") as file:
                return not _lock(file, fcntl.LOCK_SH)
        except OSError:
            return False

    def read(self) -> StackState | None:
        """The last state written, by a stack that may be gone."""
        try:
            return StackState.model_validate_json(self._state.read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, state: StackState) -> None:
        """Replace the state; readers see the old or the new one."""
        draft = self._state.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(state.model_dump_json(indent=1) + "\n")
        draft.replace(self._state)

    def status(self) -> StackStatus:
        """The stack as it is now."""
        state = self.read()
        # A state whose writer is dead is that of an earlier stack, even where a new one has just taken the lock.
        is_stale = state is not None and not psutil.pid_exists(state.supervisor)
        if state is None or state.state == "down" or is_stale or not self.is_locked():
            nothing: dict[ProcessName, int | None] = dict.fromkeys(PROCESSES)
            return StackStatus(state="down", api=None, mlflow=None, ray=None, processes=nothing)
        return StackStatus(
            state=state.state, api=state.api, mlflow=state.mlflow, ray=state.ray, processes=state.processes
        )

    def write_secret(self, name: str, secret: str) -> Path:
        """A file only its owner reads."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secret)
        return path

    def rotate_logs(self) -> None:
        """Put the logs of the last stack beside those of the next one."""
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    def tail(self, name: str, lines: int = 15) -> str:
        """The last lines of a process's log."""
        try:
            text = (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def _lock(file: IO[str], kind: int, *, pause_s: float = 0.0) -> bool:
    """Try once, after a pause; whether it is held now."""
    time.sleep(pause_s)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
