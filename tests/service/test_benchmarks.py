"""The benchmarks run: in small, so that they do not rot; what they measure here says nothing."""

from __future__ import annotations

import pytest

from tests.benchmarks.__main__ import measure
from tests.benchmarks.load import Run

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "arguments",
    [
        ("post", "--seconds", "1", "--rate", "10"),
        ("list", "--seconds", "1", "--rate", "5", "--jobs", "300"),
        ("queue", "--jobs", "100", "--rounds", "2"),
        ("archive", "--gib", "0.01"),
        ("boot", "--rounds", "1"),
    ],
)
def test_benchmark_when_small_measures(arguments: tuple[str, ...]) -> None:
    figures = measure(*arguments)
    assert figures["benchmark"] == arguments[0]
    assert figures["bar"] and isinstance(figures["reached"], bool)
    assert figures.get("errors", 0) == 0


def test_run_when_the_generator_was_late_does_not_count() -> None:
    figures = {"requests": 1, "errors": 0, "p50_ms": 1.0, "p99_ms": 1.0, "max_ms": 1.0}
    assert Run(**figures, late_p99_s=0.1).counts  # type: ignore[arg-type]
    assert not Run(**figures, late_p99_s=0.3).counts  # type: ignore[arg-type]
