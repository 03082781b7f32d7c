"""`ncfm bench`: the engine's own command, as a process of its own, since this one never loads torch."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from ncfm_core.errors import ResourcesError

NEEDED = ("torch", "torchvision", "numpy", "safetensors")


def bench(context: typer.Context) -> None:
    """Time the engine: `step` or `pipeline`, as one line of JSON.

    See `ncfm bench step --help`, `ncfm bench pipeline --help` and docs/benchmarks.md.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ResourcesError.of(
            "bench",
            None,
            f"{', '.join(missing)} not installed here: the service alone does not compute",
            'Install what computes with `pip install "ncfm[worker]"`.',
        )
    sys.stdout.flush()
    # In this process's place: signals, output and exit code are then the engine's own.
    os.execv(sys.executable, [sys.executable, "-m", "ncfm_core.bench", *context.args])
