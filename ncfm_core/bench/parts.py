"""Which part of a step takes how much of its time, out of a profiler's trace."""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = (
    "draw",
    "real_forward",
    "frequencies",
    "sampler",
    "real_characteristic",
    "match",
    "calibrate",
    "optimizer",
)
"""The regions that `distill` names."""
WHOLE = "bench"
OTHER = "other"
ABOVE_ALL_LOGS = "99"
"""The levels of Kineto end with 5."""
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Span(NamedTuple):
    start: float
    end: float
    name: str


class Shares(NamedTuple):
    parts: dict[str, float]
    """Share of each part, `other` for the rest; together 1."""
    clock: str
    """`device`: time in which the GPU computed for the part; `wall`: time that passed in it."""


def profiled(advance: Callable[[], None], device: torch.device) -> Shares:
    """Run a step once more under the profiler.

    Args:
        advance: does the step, and waits for the device.
        device: where it computes.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:
        # Kineto reads it at its first use. It looks for a GPU whatever it is to profile, and calls it an error to find none.
        os.environ.setdefault("KINETO_LOG_LEVEL", ABOVE_ALL_LOGS)
    with profile(activities=activities) as profiler, record_function(WHOLE):
        advance()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return shares(events)


def shares(events: Iterable[Mapping[str, Any]]) -> Shares:
    """Shares of the parts, from the events of a Chrome trace of the whole of a step.

    Work of a GPU belongs to the part in whose time it was launched, by whichever thread: a backward pass launches from a
    thread of its own, which knows nothing of the region that waits for it.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    spans = sorted(
        Span(event["ts"], event["ts"] + event["dur"], event["name"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"] in (*PARTS, WHOLE)
    )
    regions = [span for span in spans if span.name != WHOLE]
    taken = dict.fromkeys((*PARTS, OTHER), 0.0)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in complete
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    on_device = [event for event in complete if event.get("cat") in _ON_DEVICE]
    if on_device:
        for event in on_device:
            moment = launched.get(event.get("args", {}).get("correlation"))
            taken[OTHER if moment is None else _region_at(regions, moment)] += event["dur"]
        return _as_shares(taken, "device")
    for span in regions:
        taken[span.name] += span.end - span.start
    whole = sum(span.end - span.start for span in spans if span.name == WHOLE)
    taken[OTHER] = max(0.0, whole - sum(taken.values()))
    return _as_shares(taken, "wall")


def _region_at(regions: Sequence[Span], moment: float) -> str:
    """The region that a moment lies in; regions follow each other and never overlap."""
    place = bisect_right(regions, moment, key=lambda span: span.start) - 1
    return regions[place].name if place >= 0 and moment <= regions[place].end else OTHER


def _as_shares(taken: Mapping[str, float], clock: str) -> Shares:
    whole = sum(taken.values())
    return Shares({name: round(seconds / whole, 4) for name, seconds in taken.items()}, clock)
