"""Builds what a plan asks for: finds what is there, reserves what is not, and runs it on the cluster, most wanted first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worker.history import Event
from worker.plan import Build
from worker.records import StageResult
from worker.site import Site
from worker.storage import Storage
from worker.tasks import STARTED, Demand, Reservation, WorkerLostError, builder_of, events, ready, reserve, start

LOOK_AGAIN_S = 1.0
"""Between two looks for a result that another job builds."""
MAX_LOSSES = 3
"""Times that one result is begun again in an attempt after its process was lost."""

Results = Mapping[str, StageResult]


class Observer(Protocol):
    """Is told what happens."""

    def submitted(self, build: Build) -> None: ...

    def started(self, build: Build) -> None: ...

    def happened(self, build: Build, event: Event) -> None: ...

    def waits(self, build: Build, holder: str) -> None: ...

    def lost(self, build: Build, error: WorkerLostError) -> None: ...

    def finished(self, build: Build, result: StageResult, *, cached: bool) -> None: ...


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


@dataclass(slots=True)
class _Running:
    order: Order
    arguments: dict[str, Any]
    reservation: Reservation
    generator: Any
    losses: int = 0


class Pool:
    """Runs orders as Ray tasks, as many at a time as the cluster holds."""

    def __init__(
        self, site: Site, storage: Storage, dataset: Any, *, demand: Demand, slots: int, observer: Observer
    ) -> None:
        """
        Args:
            site: for whom.
            storage: where results are.
            dataset: reference to the data in the object store.
            demand: of each task.
            slots: tasks at once; more would only wait inside Ray, where the order no longer counts.
            observer: told of everything.
        """
        self._site, self._storage, self._dataset = site, storage, dataset
        self._demand, self._slots, self._observer = demand, slots, observer
        self._running: list[_Running] = []
        self._looked_at: dict[str, float] = {}
        self._done: dict[str, StageResult] = {}

    def run(self, orders: Sequence[Order]) -> Results:
        """All results by key; earlier orders go first where the cluster is short.

        Raises:
            NcfmError: one of them failed.
        """
        pending = list(orders)
        try:
            while pending or self._running:
                pending = [order for order in pending if not self._advance(order)]
                self._listen()
        finally:
            for running in self._running:
                running.reservation.release()
        return self._done

    def build_here(self, build: Build, compute: Callable[[], StageResult]) -> StageResult:
        """One result that this process makes itself, under the same rules."""
        order = Order(build=build, arguments=lambda _: {})
        while not self._find(order):
            reservation = reserve(order.key, self._site.built_by)
            if reservation is None:
                self._observer.waits(build, builder_of(order.key) or "another job")
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

    def _advance(self, order: Order) -> bool:
        """Bring an order to where it runs or is done; whether it got there."""
        key = order.key
        if key in self._done:
            return True
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
            self._observer.waits(order.build, builder_of(key) or "another job")
            return False
        arguments = {"key": key, **order.arguments(self._done)}
        self._running.append(_Running(order, arguments, reservation, self._start(order, arguments)))
        return True

    def _find(self, order: Order) -> bool:
        self._looked_at[order.key] = time.monotonic()
        result = self._storage.find_result(order.key)
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
            time.sleep(0.1)
            return
        heard = ready([running.generator for running in self._running], timeout_s=0.25)
        for running in [each for each in self._running if any(each.generator is one for one in heard)]:
            try:
                self._hear(running)
            except WorkerLostError as error:
                running.losses += 1
                if running.losses > MAX_LOSSES:
                    raise
                self._observer.lost(running.order.build, error)
                running.generator = self._start(running.order, running.arguments)

    def _hear(self, running: _Running) -> None:
        for event in events(running.generator):
            if isinstance(event, StageResult):
                self._running.remove(running)
                running.reservation.release()
                self._finish(running.order, event, cached=False)
                return
            if event == STARTED:
                self._observer.started(running.order.build)
            else:
                self._observer.happened(running.order.build, event)

    def _finish(self, order: Order, result: StageResult, *, cached: bool) -> None:
        self._done[order.key] = result
        self._observer.finished(order.build, result, cached=cached)
