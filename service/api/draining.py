"""The orderly end of the process: nothing new is taken, open streams are told, and what is under way may finish."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("ncfm.api")


class Draining:
    """Whether the process is about to end, and who wants to know."""

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._told: list[Callable[[], None]] = []

    def has_begun(self) -> bool:
        return self._begun.is_set()

    def on_begin(self, tell: Callable[[], None]) -> None:
        """Have a function called once, when the end begins: it must be quick and not raise. Open streams close by it."""
        self._told.append(tell)

    def begin(self) -> None:
        """From now on requests that change something are refused; a second call does nothing."""
        if self._begun.is_set():
            return
        self._begun.set()
        for tell in self._told:
            tell()
