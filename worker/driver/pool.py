"""Builds what a plan asks for: finds what is there, reserves what is not, and runs it on the cluster, most wanted first.

A result that turns out to be damaged, when it is found or when a task reads it, is set aside and built again, and with it
whatever had come across it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ncfm_core.errors import DamagedError, NcfmError, StoppedError
from worker.evidence import Results
from worker.history import Event, Kept
from worker.plan import Build
from worker.records import StageResult, StopRequest
from worker.site import Site
from worker.storage import Storage
from worker.tasks import (
    SAVING,
    STARTED,
    Demand,
    Reservation,
    WorkerLostError,
    builder_of,
    cancel,
    events,
    ready,
    reserve,
    start,
)

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""Between two looks for a result that another job builds."""
LISTEN_S = 0.25
MAX_LOSSES = 3
"""Times in a row that one result is begun again in an attempt after its process was lost: a new checkpoint begins a new row."""
MAX_DAMAGES = 3
"""Results that are built again in an attempt after they were found damaged while in use."""


class Observer(Protocol):
    """Is told what happens."""

    def submitted(self, build: Build) -> None: ...

    def started(self, build: Build) -> None: ...

    def happened(self, build: Build, event: Event) -> None: ...

    def waits(self, build: Build, holder: str | None) -> None: ...

    def lost(self, build: Build, error: WorkerLostError) -> None: ...

    def damaged(self, build: Build, error: DamagedError) -> None: ...

    def begins_again(self, build: Build) -> None: ...

    def stops(self) -> None: ...

    def finished(self, build: Build, result: StageResult, *, cached: bool) -> None: ...


class Guard(Protocol):
    """Says when an attempt has to end before its work is done."""

    def check(self) -> None:
        """
        Raises:
            NcfmError: now.
        """

    def asked(self) -> StopRequest | None:
        """The request to stop, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One result to be had."""

    build: Build
    needs: tuple[str, ...] = ()
    """Keys of the results that it is made from."""
    arguments: Callable[[Results], dict[str, Any]]
    """Arguments of its stage, given those results."""

    @property
    def key(self) -> str:
        assert self.build.key is not None, f"{self.build.label} has no key yet"
        return self.build.key


Then = Callable[[Build, StageResult], Sequence[Order]]
"""What is wanted once a result is there."""


def nothing(build: Build, result: StageResult) -> Sequence[Order]:
    return ()


@dataclass(slots=True)
class _Running:
    order: Order
    arguments: dict[str, Any]
    reservation: Reservation
    generator: Any
    losses: int = 0
    has_begun: bool = False


class Pool:
    """Runs orders as Ray tasks, as many at a time as the cluster holds."""

    def __init__(
        self,
        site: Site,
        storage: Storage,
        dataset: Any,
        *,
        demand: Demand,
        slots: int,
        observer: Observer,
        guard: Guard,
    ) -> None:
        """
        Args:
            site: for whom.
            storage: where results are.
            dataset: reference to the data in the object store.
            demand: of each task.
            slots: tasks at once; more would only wait inside Ray, where the order no longer counts.
            observer: told of everything.
            guard: asked several times a second.
        """
        self._site, self._storage, self._dataset = site, storage, dataset
        self._demand, self._slots, self._observer, self._guard = demand, slots, observer, guard
        self._orders: dict[str, Order] = {}
        self._pending: list[Order] = []
        self._running: list[_Running] = []
        self._looked_at: dict[str, float] = {}
        self._done: dict[str, StageResult] = {}
        self._then: Then = nothing
        self._damages = 0

    def run(self, orders: Sequence[Order], *, then: Then = nothing) -> Results:
        """All results by key; earlier orders go first where the cluster is short.

        Args:
            orders: what is wanted.
            then: what else, given each result; the result of an order may have another key than the order.

        Raises:
            NcfmError: one of them failed, or the guard ended it.
        """
        self._then = then
        self._pending += self._add(orders)
        try:
            while self._pending or self._running:
                for order in list(self._pending):
                    if self._advance(order):
                        self._pending.remove(order)
                # After the first look: what is there already is no reason to end.
                self._guard.check()
                self._listen()
        except StoppedError:
            self._wind_down()
            raise
        finally:
            for running in self._running:
                running.reservation.release()
        return self._done

    def build_here(self, build: Build, compute: Callable[[], StageResult]) -> StageResult:
        """One result that this process makes itself, under the same rules."""
        order = Order(build=build, arguments=lambda _: {})
        while not self._find(order):
            self._guard.check()
            reservation = reserve(order.key, self._site.built_by)
            if reservation is None:
                self._observer.waits(build, builder_of(order.key))
                time.sleep(LOOK_AGAIN_S)
                continue
            try:
                if not self._find(order):
                    self._observer.submitted(build)
                    self._observer.started(build)
                    self._finish(order, compute(), cached=False)
                break
            finally:
                reservation.release()
        return self._done[order.key]

    def build_again(self, error: DamagedError) -> Results:
        """All results once more, after one of them was found damaged by the caller.

        Raises:
            DamagedError: it is none of them, or there were too many.
        """
        self._mend(error)
        return self.run((), then=self._then)

    def _add(self, orders: Sequence[Order]) -> list[Order]:
        """Those that are new."""
        new = [order for order in orders if order.key not in self._orders]
        self._orders |= {order.key: order for order in new}
        return new

    def _advance(self, order: Order) -> bool:
        """Bring an order to where it runs or is done; whether it got there."""
        key = order.key
        if any(need not in self._done for need in order.needs):
            return False
        first_look = key not in self._looked_at
        if first_look and self._find(order):
            return True
        if len(self._running) >= self._slots or time.monotonic() - self._looked_at[key] < LOOK_AGAIN_S * (
            not first_look
        ):
            return False
        reservation = reserve(key, self._site.built_by)
        # Looked up again with the reservation in hand: its last holder may have finished since the first look.
        if self._find(order):
            if reservation is not None:
                reservation.release()
            return True
        if reservation is None:
            self._observer.waits(order.build, builder_of(key))
            # The answer takes a while, for each of those that wait.
            self._guard.check()
            return False
        arguments = {"key": key, **order.arguments(self._done)}
        self._running.append(_Running(order, arguments, reservation, self._start(order, arguments)))
        return True

    def _find(self, order: Order) -> bool:
        self._looked_at[order.key] = time.monotonic()
        try:
            result = self._storage.find_result(order.key)
        except DamagedError as error:
            self._storage.set_aside(order.key)
            self._observer.damaged(order.build, error)
            return False
        if result is None:
            return False
        self._finish(order, result, cached=True)
        return True

    def _start(self, order: Order, arguments: dict[str, Any]) -> Any:
        self._observer.submitted(order.build)
        kind, label = order.build.kind, order.build.label
        return start(kind, self._site, self._dataset, arguments, demand=self._demand, label=label)

    def _listen(self) -> None:
        """Take what the running tasks have to say, waiting a little for the first."""
        if not self._running:
            time.sleep(0.1 if self._pending else 0)
            return
        heard = ready([running.generator for running in self._running], timeout_s=LISTEN_S)
        for running in [each for each in self._running if any(each.generator is one for one in heard)]:
            try:
                self._hear(running)
            except WorkerLostError as error:
                running.losses += 1
                # The last thing that it did may have been its commit.
                if self._find(running.order):
                    self._end(running)
                    continue
                if running.losses > MAX_LOSSES:
                    raise
                self._observer.lost(running.order.build, error)
                running.has_begun = False
                running.generator = self._start(running.order, running.arguments)
            except DamagedError as error:
                self._end(running)
                self._pending.append(running.order)
                self._mend(error)
            except StoppedError:
                self._end(running)
                raise

    def _hear(self, running: _Running) -> None:
        for event in events(running.generator):
            if isinstance(event, StageResult):
                self._end(running)
                self._finish(running.order, event, cached=False)
                return
            if event == STARTED:
                running.has_begun = True
                self._observer.started(running.order.build)
            else:
                if isinstance(event, Kept):
                    running.losses = 0
                self._observer.happened(running.order.build, event)

    def _end(self, running: _Running) -> None:
        self._running.remove(running)
        running.reservation.release()

    def _finish(self, order: Order, result: StageResult, *, cached: bool) -> None:
        self._done[order.key] = self._done[result.key] = result
        self._observer.finished(order.build, result, cached=cached)
        self._pending = self._add(self._then(order.build, result)) + self._pending

    def _mend(self, error: DamagedError) -> None:
        """Have the result built again that a damaged file belongs to, unless it is whole by now."""
        keys = [key for key, result in self._done.items() if any(file.path == error.path for file in result.files)]
        if not keys:
            raise error
        self._damages += 1
        self._storage.set_aside(self._done[keys[0]].key)
        order = self._orders.get(keys[0])
        # What was made under another key than its order's, or by this process, is for the next attempt.
        if order is None or len(keys) > 1 or self._damages > MAX_DAMAGES:
            raise error
        for key in keys:
            del self._done[key]
        self._observer.damaged(order.build, error)
        self._observer.begins_again(order.build)
        self._looked_at.pop(order.key, None)
        self._pending.insert(0, order)

    def _wind_down(self) -> None:
        """Let those that can save themselves do so where that is asked for, and end the others."""
        request = self._guard.asked()
        self._observer.stops()
        for running in list(self._running):
            saves = running.order.build.kind in SAVING and running.has_begun
            if request is None or not request.checkpoint or not saves:
                cancel(running.generator)
                self._end(running)
        while self._running:
            heard = ready([running.generator for running in self._running], timeout_s=LISTEN_S)
            for running in [each for each in self._running if any(each.generator is one for one in heard)]:
                try:
                    self._hear(running)
                except NcfmError:
                    self._end(running)  # it stopped, or failed: either way it is over
                except Exception:  # failed on an error of our own: that is no reason not to stop
                    log.exception("%s failed while it was to stop", running.order.build.label)
                    self._end(running)
