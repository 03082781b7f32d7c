"""Starting the four processes, watching them, ending them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from service.local.probes import Probe
from service.local.state import Home, StackError, StackState
from service.local.sweep import STACK_ID, STACK_PART, sweep
from service.processes import PROCESSES, STOP_ORDER, ProcessName

Say = Callable[[str], None]

TICK_S = 0.2
START_LIMIT_S = 120.0
STOP_LIMIT_S: dict[ProcessName, float] = {"controller": 1.5, "api": 2.0, "ray": 3.0, "mlflow": 1.5}
"""Time to end by itself, together under 8 s; a Ray head with a busy driver would take 30 s."""
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 30.0
"""A child that has run for so long may die again without waiting longer."""

FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_ID",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
)
"""Variables that would lead our processes to another cluster or server."""


@dataclass(slots=True)
class Child:
    """One process of the stack and what is known of it."""

    name: ProcessName
    command: tuple[str, ...]
    environment: Mapping[str, str]
    probe: Probe
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    is_ready: bool = False
    backoff_s: float = FIRST_BACKOFF_S
    restart_at: float | None = None
    """Set while it is dead and will be started again."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.returncode is None else None


@dataclass(slots=True)
class Supervisor:
    """The stack of one home, while its lock is held."""

    home: Home
    state: StackState
    children: dict[ProcessName, Child]
    say: Say
    lifeline: int | None = None
    """A file descriptor whose end asks for a stop, as a signal does."""
    _signals: list[int] = field(default_factory=list)

    def run(self, on_ready: Callable[[], None]) -> None:
        """Start everything, call `on_ready` once all answer, and go on until SIGINT, SIGTERM or SIGHUP.

        Raises:
            StackError: a child does not start. Nothing is left running, as always.
        """
        with self._catching_signals(), self._guarded():
            try:
                for name in PROCESSES:
                    self._start(self.children[name])
                self._save("starting")
                if self._await_all():
                    on_ready()
                    self._supervise()
            except OSError as error:
                hint = "Is the disk full, or the folder gone?"
                raise StackError.of(
                    "NCFM_HOME", str(self.home.folder), f"no process can be started: {error}", hint
                ) from error
            finally:
                self._stop()

    def _start(self, child: Child) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"}
        environment |= child.environment
        environment |= {STACK_ID: self.state.stack_id, STACK_PART: child.name, "PYTHONUNBUFFERED": "1"}
        with (self.home.logs / f"{child.name}.log").open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.home.folder,
                # Away from the terminal: Ctrl-C reaches the supervisor alone, which ends its children in order.
                start_new_session=True,
            )
        child.started_at = time.monotonic()
        child.is_ready = False
        child.restart_at = None

    def _await_all(self) -> bool:
        """Wait for the first time that all are ready; False when a signal came first."""
        started = time.monotonic()
        while not self._must_stop():
            for child in self.children.values():
                self._check_started(child)
                if not child.is_ready and child.probe():
                    child.is_ready = True
                    self.say(f"{child.name} is ready after {time.monotonic() - started:.1f} s")
            if all(child.is_ready for child in self.children.values()):
                self._save("up")
                return True
            if time.monotonic() - started > START_LIMIT_S:
                late = next(child for child in self.children.values() if not child.is_ready)
                raise self._not_started(late, f"does not answer after {START_LIMIT_S:.0f} s")
            time.sleep(TICK_S)
        return False

    def _check_started(self, child: Child) -> None:
        assert child.process is not None
        code = child.process.poll()
        if code is not None:
            raise self._not_started(child, f"ended at once ({_ending(code)})")

    def _not_started(self, child: Child, what: str) -> StackError:
        log = self.home.logs / f"{child.name}.log"
        return StackError.of(
            child.name,
            None,
            f"the process {what}",
            f"The end of its log, {log}:\n{self.home.tail(child.name) or '(empty)'}",
        )

    def _supervise(self) -> None:
        """Restart what dies, until a signal comes."""
        while not self._must_stop():
            changed = False
            for child in self.children.values():
                changed |= self._watch(child)
            if changed:
                self._save("up" if all(child.is_ready for child in self.children.values()) else "starting")
            time.sleep(TICK_S)

    def _watch(self, child: Child) -> bool:
        """One look at one child; whether anything changed."""
        now = time.monotonic()
        if child.restart_at is not None:
            if now < child.restart_at:
                return False
            self._start(child)
            return True
        assert child.process is not None
        code = child.process.poll()
        if code is not None:
            self._plan_restart(child, code, now)
            return True
        if not child.is_ready and child.probe():
            child.is_ready = True
            self.say(f"{child.name} is ready again")
            return True
        return False

    def _plan_restart(self, child: Child, code: int, now: float) -> None:
        if now - child.started_at > STEADY_S:
            child.backoff_s = FIRST_BACKOFF_S
        # What it had started would keep its ports.
        sweep(self.state.stack_id, child.name, term_wait_s=0)
        self.say(f"{child.name} died ({_ending(code)}); it is started again in {child.backoff_s:g} s")
        child.is_ready = False
        child.restart_at = now + child.backoff_s
        child.backoff_s = min(child.backoff_s * 2, LONGEST_BACKOFF_S)

    def _stop(self) -> None:
        """End the children in order, each within its time, then whatever is left of the stack."""
        self._save("down")
        for name in STOP_ORDER:
            child = self.children[name]
            if child.pid is None:
                continue
            assert child.process is not None
            child.process.terminate()
            deadline = time.monotonic() + STOP_LIMIT_S[name]
            # A second signal: somebody does not want to wait.
            while child.process.poll() is None and time.monotonic() < deadline and len(self._signals) < 2:
                time.sleep(TICK_S / 2)
            sweep(self.state.stack_id, name, term_wait_s=0)
            child.process.wait()
        sweep(self.state.stack_id, term_wait_s=0)
        self._save("down")

    def _must_stop(self) -> bool:
        if (
            self.lifeline is not None
            and select.select([self.lifeline], [], [], 0)[0]
            and not os.read(self.lifeline, 64)
        ):
            self.lifeline = None
            self._signals.append(signal.SIGHUP)
        return bool(self._signals)

    def _save(self, state: str) -> None:
        pids = {name: child.pid for name, child in self.children.items()}
        self.state = self.state.model_copy(update={"state": state, "processes": pids})
        try:
            self.home.write(self.state)
        except OSError as error:
            # A full disk must not keep the children from being watched and ended.
            self.say(f"the state cannot be written to {self.home.folder}: {error.strerror}")

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        def remember(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        previous = {each: signal.signal(each, remember) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Have a guardian that sweeps when this process is gone, even by SIGKILL."""
        guardian = subprocess.Popen(
            [sys.executable, "-m", "service.local.sweep", self.state.stack_id, self.state.ray_tmpdir],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield
        finally:
            # The end of its input is its signal; it finds nothing to do and ends.
            guardian.communicate()


def _ending(code: int) -> str:
    """How a process ended, in words."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
