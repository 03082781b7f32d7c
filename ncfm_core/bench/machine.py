"""The device that is measured: which, how much memory, and waiting for it."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch

from ncfm_core.errors import ResourcesError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What resets VmHWM when it is written to clear_refs (proc(5))."""


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ResourcesError: `cuda`, and there is none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        why = "torch finds no CUDA device here" if torch.version.cuda else "this torch is built without CUDA"
        raise ResourcesError.of("--device", name, why, "Use --device cpu, or a machine with a GPU and its driver.")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak_mib` count from now on, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def held_mib(device: torch.device) -> float:
    """MiB held now: by torch on a GPU, by the process (VmRSS) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _process_mib("VmRSS")


def peak_mib(device: torch.device) -> float:
    """Most MiB held at once since `reset_peak`: by torch on a GPU, by the process (VmHWM) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _process_mib("VmHWM")


def _process_mib(field: str) -> float:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) / 2**10
    except (OSError, StopIteration):
        # No such file outside Linux: the peak since the start is the nearest that all systems know.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
