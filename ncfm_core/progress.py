"""What a long computation yields while it runs. Torch-free."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """One report, made every few dozen steps so that the device is rarely waited for."""

    completed: int
    total: int
    unit: str
    """What is counted: `step`, `epoch`, `student`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Values at `completed`, by name."""


def never() -> bool:
    """The answer where nobody asks a computation to pause."""
    return False


def finish(steps: Generator[Any, None, T]) -> T:
    """Run to the end without a word."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value
